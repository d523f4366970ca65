"""Padded batches to packed tokens and back, so that padding never reaches the cache.

A padded batch is [B, heads, S, D] with a mask [B, S]; packed is [T, heads, D], the valid tokens in order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.ops.layout import Batch


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a padded batch [B, S] packs. index: int64 [T] into B * S, None where nothing is padding."""

    shape: tuple[int, int]
    index: Tensor | None
    batch: Batch
    tokens: int
    """T."""
    filled: list[int]
    """The rows that have any."""

    def pack(self, x: Tensor) -> Tensor:
        """[B, heads, S, D] -> [T, heads, D]."""
        return self.pack_tokens(x.transpose(1, 2))

    def pack_tokens(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...]; padding becomes 0."""
        if self.index is None:
            return x.unflatten(0, self.shape)
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        flat[self.index] = x
        return flat.unflatten(0, self.shape)


def packing_of(shape: tuple[int, int], valid: Tensor | None, device: torch.device) -> Packing:
    """The packing of a batch [B, S] whose valid tokens are bool `valid` [B, S] (None = all)."""
    rows, length = shape
    index = None
    if valid is None or bool(valid.all()):
        starts = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        longest, tokens, filled = length, rows * length, list(range(rows))
    else:
        counts = valid.sum(-1, dtype=torch.int32)
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        index = valid.flatten().nonzero()[:, 0]
        per_row = counts.tolist()
        longest, tokens, filled = max(per_row), sum(per_row), [row for row, count in enumerate(per_row) if count]
        if longest == 1 and len(index) < rows:
            longest = 2  # a row without a token: not a decode step, which has exactly one token a row
    batch = Batch(rows=torch.arange(rows, device=device), starts=starts, longest=longest)
    return Packing(shape=shape, index=index, batch=batch, tokens=tokens, filled=filled)
