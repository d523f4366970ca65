"""release in Triton: one launch, a program per (row, layer, head), no wait for the device.

A program counts the pages of its head that have no other owner, takes their places on the free stack by one atomic
addition, and writes them there. Nothing may take pages while it runs: the places are written after they are counted.
Owners beyond the first are counted down by atomics; the program that finds none left owns the page alone.
"""

# triton.jit's types know no launch options and no starred arguments.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sparsekv.ops.release.api import Tables

TILE = 256
"""Pages at a time."""


def release(tables: Tables, rows: Tensor) -> None:
    """rows: int64 [n], distinct, -1 for none."""
    layers, total, heads, columns = tables.pages.shape
    tensors = tables.pages, tables.lengths, tables.seen, tables.free, tables.free_count, tables.extra_owners
    assert all(t.is_contiguous() for t in tensors), "release writes in place: the tables must be contiguous"
    _release[(len(rows), layers, heads)](
        *tensors, rows, total, columns, H=heads, C=tables.page_size, TILE=TILE, num_warps=4
    )


@triton.jit(do_not_specialize=["rows", "total", "columns"])
def _release(
    pages, lengths, seen, free, free_count, extra_owners, rows, total, columns,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows + tl.program_id(0))
    layer, head = tl.program_id(1), tl.program_id(2)
    if row < 0:
        return
    place = layer.to(tl.int64) * total + row
    pair = place * H + head
    count = tl.cdiv(tl.load(lengths + pair), C)
    table = pages + pair * columns
    for base in range(0, count, TILE):
        lane = base + tl.arange(0, TILE)
        held = lane < count
        page = tl.load(table + lane, mask=held, other=0)
        others = tl.atomic_add(extra_owners + page, -1, mask=held, sem="relaxed")
        alone = held & (others == 0)
        tl.store(extra_owners + page, 0, mask=alone)
        freed = alone.to(tl.int32)
        at = tl.atomic_add(free_count, tl.sum(freed), sem="relaxed") + tl.cumsum(freed, 0) - 1
        tl.store(free + at, page, mask=alone & (at >= 0))
    tl.debug_barrier()  # every warp has read the length before one warp writes it
    tl.store(lengths + pair, 0)
    if head == 0:
        tl.store(seen + place, 0)
