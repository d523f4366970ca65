"""tally in Triton: one launch, a program a row."""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Heads at a time."""


def tally(lengths: Tensor, seen: Tensor, free_count: Tensor, page_size: int) -> Tensor:
    """See api.tally."""
    layers, rows, heads = lengths.shape
    assert lengths.is_contiguous() and seen[0].is_contiguous()
    table = torch.empty(rows + 1, 2 + page_size, dtype=torch.int32, device=lengths.device)
    _tally[(rows + 1,)](
        lengths, seen, free_count, table, rows, layers * heads, H=heads, C=page_size,
        CP=triton.next_power_of_2(page_size), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=["rows", "pairs"])
def _tally(
    lengths, seen, free_count, table, rows, pairs,
    H: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    residue = tl.arange(0, CP)
    heads = tl.zeros([CP], tl.int32)
    pages = 0
    stop = tl.where(row < rows, pairs, 0)
    for base in range(0, stop, TILE):
        pair = base + tl.arange(0, TILE)
        live = pair < pairs
        at = (pair // H).to(tl.int64) * rows * H + row * H + pair % H
        length = tl.load(lengths + at, mask=live, other=0)
        pages += tl.sum(tl.cdiv(length, C))
        heads += tl.sum(((length % C)[:, None] == residue[None, :]).to(tl.int32) * live[:, None], 0)
    first = tl.load(seen + row, mask=row < rows, other=0) + tl.load(free_count, mask=row == rows, other=0)
    out = table + row * (2 + C)
    tl.store(out, first)
    tl.store(out + 1, pages)
    tl.store(out + 2 + residue, heads, mask=residue < C)
