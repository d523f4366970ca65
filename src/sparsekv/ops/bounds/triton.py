"""bounds in Triton: three kernels, none of which waits for the host.

`_refresh`, a program per (sequence, head, page), reduces the keys of the page. `_score`, a program per (sequence, head,
tile of pages), reads two vectors a page and writes its bound: max(q low, q high) is q high where q > 0 and q low
elsewhere, so that a tile's bounds under all queries of the group are two matrix products. `_select`, a program per
(sequence, head), holds all scores of its head at once. Float32 as an integer in the order of its values has 32 bits:
the count-th largest is found exactly, two bits at a time from the highest, by counting the scores that are not below.
What is above it is read, and of what equals it the first columns.

`_select` alone is compiled for a number of pages, the next power of two.
"""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.launch import dependent, follow, take_turn
from sparsekv.ops.layout import LayerPages

TILE_BYTES = 16384
"""Bytes of minima, and as many of maxima, that a program of `_score` reads at once."""
FREE = ["rows", "pages", "lengths", "columns"]
"""Arguments of every kernel here that must not be specialised."""


def obstacle(layer: LayerPages, *queries: Tensor) -> str | None:
    """Why these kernels cannot run, as the end of a sentence; None if they can."""
    kinds = {x.dtype for x in (layer.kv, *queries)}
    if not kinds <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"needs bfloat16, float16 or float32, not {', '.join(sorted(map(str, kinds)))}"
    if layer.page_size & (layer.page_size - 1):
        return f"needs a page size that is a power of two, not {layer.page_size}"
    return None


def refresh(layer: LayerPages, rows: Tensor, bounds: Tensor, longest: int) -> None:
    """See api.refresh."""
    _launch_refresh(layer, rows, None, bounds, _width(layer, longest), written="all")


def refresh_written(layer: LayerPages, rows: Tensor, slots: Tensor | None, bounds: Tensor) -> None:
    """See api.refresh_written."""
    _launch_refresh(layer, rows, slots, bounds, 1, written="newest" if slots is None else "given")


def select(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    bounds: Tensor,
    count: int,
    written: Tensor | None,
    longest: int,
    reads: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See api.select: page table, lengths and tokens seen."""
    (batch, _, dim), (kv_heads, columns) = q.shape, layer.pages.shape[1:]
    heads, group, width = batch * kv_heads, q.shape[1] // kv_heads, _width(layer, longest)
    like = {"dtype": torch.int32, "device": q.device}
    out = torch.empty(batch, kv_heads, count, **like), torch.empty(batch, kv_heads, **like), torch.empty(batch, **like)
    if heads == 0:
        return out
    assert reads is None or reads[0].is_contiguous(), "reads are counted in place: each half must be contiguous"
    pages, lengths = layer.pages.contiguous(), layer.lengths.contiguous()
    scores = torch.empty(heads, width, dtype=torch.float32, device=q.device)
    shape = {"H": kv_heads, "C": layer.page_size, "FOLLOW": follow(q.device)}
    if width > count:
        padded = max(triton.next_power_of_2(dim), 16)
        tile = min(max(TILE_BYTES // (padded * bounds.itemsize), 16), 128)
        _score[(heads, triton.cdiv(width, tile))](
            q.contiguous(), bounds.contiguous(), pages, lengths, rows, scores, columns, width, count,
            **shape, G=group, GP=max(triton.next_power_of_2(group), 16),
            D=dim, DP=padded, DOT=dot_type(q.dtype, bounds.dtype), TILE=tile,
            num_warps=4, **dependent(q.device),
        )  # fmt: skip
    block = triton.next_power_of_2(max(width, 1))
    _select[(heads,)](
        scores, pages, lengths, rows, layer.seen, layer.ring.contiguous(),
        rows if written is None else written.contiguous(), *out,
        rows if reads is None else reads, columns, layer.window, width, count, 0 if reads is None else reads.stride(0),
        **shape, BLOCK=block, NEWEST=written is None, COUNT=reads is not None,
        num_warps=min(max(block // 256, 4), 16), **dependent(q.device),
    )  # fmt: skip
    return out


def _width(layer: LayerPages, longest: int) -> int:
    """Page-table columns that `longest` slots take."""
    return min(-(-longest // layer.page_size), layer.pages.shape[-1])


def _launch_refresh(
    layer: LayerPages, rows: Tensor, slots: Tensor | None, bounds: Tensor, width: int, *, written: str
) -> None:
    """All of the first `width` pages of each head, or the one that holds its slot or the newest."""
    assert bounds.is_contiguous(), "bounds are written in place: they must be contiguous"
    (heads, columns), dim, size = layer.pages.shape[1:], layer.kv.shape[-1], layer.page_size
    if width == 0 or rows.shape[0] == 0:
        return
    padded = triton.next_power_of_2(dim)
    _refresh[(width, rows.shape[0] * heads)](
        layer.kv, layer.pages.contiguous(), layer.lengths.contiguous(), rows, layer.seen, layer.ring.contiguous(),
        rows if slots is None else slots.contiguous(), bounds, columns, layer.window,
        H=heads, D=dim, DP=padded, C=size, BLOCK=max(1, min(size, 4096 // padded)),
        WRITTEN=written, FOLLOW=follow(rows.device), num_warps=4, **dependent(rows.device),
    )  # fmt: skip


@triton.jit
def _length(lengths, rows, head, H: tl.constexpr):
    """The row (-1: padded) and the length of head 0 .. B * H - 1 of the call."""
    row = tl.load(rows + head // H).to(tl.int64)
    return row, tl.load(lengths + row * H + head % H, mask=row >= 0, other=0)


@triton.jit
def _newest(seen, ring, row, pair, length, window):
    """The slot that the last decode step of a row >= 0 took by the ring rule: ops.layout.written."""
    slot = length - 1
    if window > 0:
        entry = tl.maximum(tl.load(seen + row) - 1, 0) % window
        slot = tl.load(ring + pair * window + entry) >> 1
    return slot


@triton.jit(do_not_specialize=[*FREE, "seen", "ring", "slots", "window"])
def _refresh(
    kv, pages, lengths, rows, seen, ring, slots, bounds, columns, window,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    WRITTEN: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    column, head = tl.program_id(0), tl.program_id(1)
    if FOLLOW:
        take_turn()
    row, length = _length(lengths, rows, head, H)
    if length == 0:
        return
    if WRITTEN != "all":
        if WRITTEN == "newest":
            slot = _newest(seen, ring, row, row * H + head % H, length, window)
        else:
            slot = tl.load(slots + head)
        column = tl.where(slot >= 0, slot // C, columns)
    live = tl.minimum(length - column * C, C)
    if (live <= 0) | (column >= columns):
        return
    page = tl.load(pages + (row * H + head % H) * columns + column).to(tl.int64)
    slot, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, DP)
    low = tl.full([BLOCK, DP], float("inf"), tl.float32)
    high = tl.full([BLOCK, DP], -float("inf"), tl.float32)
    for base in range(0, live, BLOCK):
        mask = (base + slot < live) & (d < D)[None, :]
        key = tl.load(kv + page * (2 * C * D) + (base + slot) * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.where(mask, tl.minimum(low, key), low)
        high = tl.where(mask, tl.maximum(high, key), high)
    at = bounds + page * (2 * D) + d
    tl.store(at, tl.min(low, 0), mask=d < D)
    tl.store(at + D, tl.max(high, 0), mask=d < D)


@triton.jit(do_not_specialize=[*FREE, "scores", "width", "count"])
def _score(
    q, bounds, pages, lengths, rows, scores, columns, width, count,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, TILE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """scores [B * H, width]: the bound of each page, of heads that hold more than count."""
    head = tl.program_id(0).to(tl.int64)
    if FOLLOW:
        take_turn()
    row, length = _length(lengths, rows, head, H)
    held = tl.cdiv(length, C)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if (held <= count) | (tl.program_id(1) * TILE >= held):
        return
    live = column < held
    page = tl.load(pages + (row * H + head % H) * columns + column, mask=live, other=0).to(tl.int64)
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    query = tl.load(q + (head * G + g) * D + d, mask=(g < G) & (d < D), other=0.0).to(tl.float32)
    at = bounds + page[:, None] * (2 * D) + d
    mask = live[:, None] & (d < D)
    low = tl.load(at, mask=mask, other=0.0).to(DOT)
    high = tl.load(at + D, mask=mask, other=0.0).to(DOT)
    x = tl.dot(tl.maximum(query, 0.0).to(DOT), tl.trans(high), input_precision="ieee")
    x = tl.dot(tl.minimum(query, 0.0).to(DOT), tl.trans(low), x, input_precision="ieee")
    tl.store(scores + head * width + column, tl.max(tl.where(g < G, x, -float("inf")), 0), mask=live)


@triton.jit
def _ordered(x):
    """uint32 in the order of float32 x, 0 and 2**32 - 1 left free. x is never -0, since a dot starts from 0."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _highest(key, count):
    """int32, 1 for the `count` largest of distinct places of key uint32 [N], of equals the first."""
    least = tl.full([], 0, tl.uint32)  # the largest number that at least `count` keys are not below
    one = tl.full([], 1 << 30, tl.uint32)
    for _ in range(16):  # two bits at a time: three counts, each below 2**21, are summed as one number
        a, b, c = least + one, least + 2 * one, least + 3 * one
        counts = tl.sum(
            (key >= a).to(tl.int64) + ((key >= b).to(tl.int64) << 21) + ((key >= c).to(tl.int64) << 42)
        )  # fmt: skip
        above_a, above_b, above_c = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        least = tl.where(above_c >= count, c, tl.where(above_b >= count, b, tl.where(above_a >= count, a, least)))
        one = one >> 2
    above, equal = (key > least).to(tl.int32), (key == least).to(tl.int32)
    room = count - tl.sum(above)
    return above | (equal & (tl.cumsum(equal, 0) <= room).to(tl.int32))


@triton.jit(
    do_not_specialize=[
        *FREE, "scores", "seen", "ring", "written", "table", "tokens", "seen_by", "reads", "window", "width", "count",
        "stride",
    ]
)  # fmt: skip
def _select(
    scores, pages, lengths, rows, seen, ring, written, table, tokens, seen_by, reads, columns, window, width, count,
    stride, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, NEWEST: tl.constexpr, COUNT: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    """table [B, H, count], tokens [B, H], seen_by [B]: the view's page table, lengths and tokens seen; stride: between
    the two halves of reads."""
    head = tl.program_id(0).to(tl.int64)
    if FOLLOW:
        take_turn()
    row, length = _length(lengths, rows, head, H)
    if head % H == 0:
        tl.store(seen_by + head // H, tl.load(seen + row, mask=row >= 0, other=0))
    held = tl.cdiv(length, C)
    column = tl.arange(0, BLOCK)
    chosen = (column < held).to(tl.int32)
    if held > count:
        key = _ordered(tl.load(scores + head * width + column, mask=column < held, other=0.0))
        if NEWEST:
            slot = _newest(seen, ring, row, row * H + head % H, length, window)
        else:
            slot = tl.load(written + head)
        key = tl.where((slot >= 0) & (column == slot // C), 0xFFFFFFFF, key)
        chosen = _highest(tl.where(column < held, key, 0), count)
    page = tl.load(pages + (row * H + head % H) * columns + column, mask=chosen == 1, other=0)
    tl.store(table + head * count + tl.cumsum(chosen, 0) - 1, page, mask=chosen == 1)
    total = tl.sum(tl.where(chosen == 1, tl.minimum(length - column * C, C), 0))
    tl.store(tokens + head, total)
    if COUNT:
        at = reads + row * H + head % H
        tl.store(at, tl.load(at, mask=row >= 0, other=0) + total, mask=row >= 0)
        tl.store(at + stride, tl.load(at + stride, mask=row >= 0, other=0) + held, mask=row >= 0)
