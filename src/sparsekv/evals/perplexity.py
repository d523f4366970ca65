"""What eviction costs on running text: perplexity beside the dense model's, KL(dense || sparse), and how often the most
likely token is the same, all at the ratio that was measured while it was taken."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv import dms
from sparsekv.evals.forward import Reading
from sparsekv.evals.methods.intervals import bootstrap
from sparsekv.modeling.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Of one text at one setting of the dial."""

    offset: float | None
    """On the logits. -inf is written as null in JSON."""
    ratio: float
    """Tokens seen / tokens held at the end of the rows, the window counted."""
    perplexity: float
    perplexity_dense: float
    divergence: float
    """KL(dense || sparse), nats per token."""
    agreement: float
    """The share of positions whose most likely token is dense's."""
    rise: tuple[float, float] | None = None
    """The 95 % interval of perplexity / perplexity_dense - 1, bootstrapped over rows; None of a single row."""


def rise_of(text: Mapping[str, Any]) -> float:
    """Of perplexity over dense. text: a TextScore as it is written."""
    return text["perplexity"] / text["perplexity_dense"] - 1


class TextRows:
    """Rows of a text and what the dense model makes of them. rows: int64 [N, S], on the model's device; reference: the
    dense model, or the same one, made while it is within contexts.original."""

    def __init__(self, split: SplitModel, rows: Tensor, *, reference: SplitModel, batch: int) -> None:
        self.split, self.reference, self.rows, self.batches = split, reference, rows, rows.split(batch)
        with torch.no_grad():
            self.dense = [reference.hidden(ids) for ids in self.batches]

    def score(self, read: Callable[[Tensor], Reading], *, offset: float | None) -> TextScore:
        """read: ids int64 [B, S] -> Reading, at the dial that `offset` says."""
        per_row: list[Tensor] = []
        seen, held = 0, 0.0
        for ids, dense_hidden in zip(self.batches, self.dense, strict=True):
            reading = read(ids)
            seen, held = seen + reading.seen, held + reading.held
            for row in range(len(ids)):
                parts = reading.hidden[row, :-1], dense_hidden[row, :-1], ids[row, 1:]
                per_row.append(torch.stack([self._compare(*part) for part in self.split.chunks(*parts)]).sum(0))
        sums = torch.stack(per_row)
        ours, theirs, divergence, agreement = (sums.sum(0) / (seen - len(self.rows))).tolist()
        return TextScore(
            offset=offset,
            ratio=seen / held,
            perplexity=math.exp(ours),
            perplexity_dense=math.exp(theirs),
            divergence=divergence,
            agreement=agreement,
            rise=self._rise(sums),
        )

    def _rise(self, sums: Tensor) -> tuple[float, float] | None:
        if len(sums) < 2:
            return None
        tokens = np.full(len(sums), self.rows.shape[1] - 1.0)
        difference = (sums[:, 0] - sums[:, 1]).numpy()
        found = bootstrap(difference, tokens, unit="rows", statistic=np.expm1)
        assert found.low is not None and found.high is not None
        return found.low, found.high

    @torch.no_grad()
    def _compare(self, sparse: Tensor, dense: Tensor, following: Tensor) -> Tensor:
        """Sums over positions of nll, dense nll, divergence and agreement."""
        ours, theirs = self.split.logits(sparse).float(), self.reference.logits(dense).float()
        cross_entropy = torch.nn.functional.cross_entropy
        sums = (
            cross_entropy(ours, following, reduction="sum"),
            cross_entropy(theirs, following, reduction="sum"),
            dms.kl_teacher_student(theirs, ours).sum(),
            (ours.argmax(-1) == theirs.argmax(-1)).sum(),
        )
        return torch.stack([x.double() for x in sums]).cpu()
