"""Batches for fine-tuning: chains packed into rows, in an order that the seed decides, so that a run can go on."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsekv.retrofit.data.packing import Row, pack

IGNORE = -100
"""The label of what is not learned."""

Batch = tuple[Tensor, Tensor, Tensor]
"""(tokens, labels, documents), each int64 [B, S]; the label of a position is the next token, where it is of the same
chain and not of its prompt."""


def batches(chains: Sequence[np.ndarray], *, batch: int, length: int, seed: int, start: int) -> Iterator[Batch]:
    """Without end, from batch `start` on; each epoch in an order of its own. chains: as chats.encode gives them."""
    rows = pack(_shuffled(chains, seed), length, whole=True)
    for _ in itertools.islice(rows, start * batch):
        pass
    while True:
        found = [_labelled(next(rows)) for _ in range(batch)]
        tokens, labels, documents = (torch.from_numpy(np.stack(x)) for x in zip(*found, strict=True))
        yield tokens, labels, documents


def _shuffled(chains: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(chains)):
            yield chains[index]


def _labelled(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, documents = (x.astype(np.int64) for x in row)
    labels = np.full(len(ids), IGNORE)
    learned = (ids[1:] >= 0) & (documents[1:] == documents[:-1])
    labels[:-1][learned] = ids[1:][learned]
    return np.where(ids < 0, ~ids, ids), labels, documents
