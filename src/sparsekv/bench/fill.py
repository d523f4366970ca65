"""A cache as a learned policy leaves it, without running a model: ragged lengths, scattered pages, a marked ring.

Lengths are log-normal over heads (sigma 0.7, mean context / ratio): some heads keep nearly all, many keep little.
"""

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.bounds import refresh
from sparsekv.ops.layout import held_slots

SPREAD = 0.7
"""The log-normal's sigma."""


def spread_lengths(heads: int, mean: float, longest: int, generator: torch.Generator, *, least: int = 1) -> Tensor:
    """int64 [heads]: log-normal lengths whose mean is `mean`, each between least and longest; all alike where the mean
    is the longest."""
    if mean >= longest:  # clipping cannot reach that mean
        return torch.full((heads,), longest)
    lengths = torch.exp(SPREAD * torch.randn(heads, generator=generator, dtype=torch.float64))
    for _ in range(20):  # clipping moves the mean: scale again
        lengths = (lengths * (mean / lengths.mean())).clamp(least, longest)
    return lengths.round().long()


def pages_for(lengths: Tensor, page_size: int) -> int:
    """How many pages heads of int64 lengths take."""
    return int((-(-lengths // page_size)).sum())


def fill(
    ragged: RaggedCache, lengths: Tensor, generator: torch.Generator, *, seen: int = 0, marked: float = 0.0
) -> None:
    """Give each head of int64 lengths [N, R, H] its pages, in random order, with random contents.

    seen: tokens that each row has seen; marked: the share of marks in the rings, whose tokens lie in the last slots.
    Raises ValueError where the pool is too small.
    """
    pool = ragged.pool
    total = pages_for(lengths, pool.page_size)
    ids = pool.take(total)[torch.randperm(total, generator=generator).to(pool.kv.device)].int()
    for page in pool.kv.split(1 << 14):
        page.normal_()
    used = torch.arange(ragged.pages.shape[-1]) < -(-lengths // pool.page_size)[..., None]
    ragged.pages[used.to(ragged.pages.device)] = ids
    ragged.lengths.copy_(lengths)
    ragged.seen.fill_(seen)
    for ring, length in zip(ragged.rings, lengths, strict=True):
        window = ring.shape[-1]
        slot = length[..., None] - window + torch.arange(window)
        mark = torch.rand(slot.shape, generator=generator) < marked
        ring.copy_(slot << 1 | mark.long())


def remember(ragged: RaggedCache, seen: int) -> None:
    """What policies would know of such a cache: tokens are the newest `seen`, bounds are those of the keys."""
    rows = torch.arange(ragged.rows, device=ragged.lengths.device)
    born, bounds = ragged.pool.slot_state.get("born"), ragged.pool.page_state.get("bounds")
    for index in range(len(ragged.rings)):
        layer = ragged.layer(index)
        longest = int(layer.lengths.max())
        if born is not None:
            at, _ = held_slots(layer, rows, longest)
            slot = torch.arange(at.shape[-1], device=rows.device, dtype=torch.int32)
            born.view(-1)[at] = seen - layer.lengths[rows][..., None] + slot
        if bounds is not None:
            refresh(layer, rows, bounds, longest=longest)
