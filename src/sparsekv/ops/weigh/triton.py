"""weigh in Triton: one program per (head, tile of slots), which holds its keys and meets every query that sees them.

The queries of a sequence times the G query heads of one KV head are numbered through, so that a tile of them needs no
padding for any group; a tile of slots begins with the first query that sees it. Sums stay in registers: nothing is
added across programs, so that results are the same in every run. Where the log-sum-exp is not known, a pass before
finds it: one program per (head, tile of queries), online softmax over the slots.

Scores are in base 2: x = scale * log2(e) * q . k.
"""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.decode.triton import LN_2, LOG2_E, obstacle
from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.launch import dependent, follow, take_turn
from sparsekv.ops.layout import Batch, LayerPages

__all__ = ["obstacle", "weigh"]

LOWEST = tl.constexpr(-1e30)  # the first running maximum: finite, so that a row that sees nothing yet weighs 0, not NaN


def cut(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Slots and query rows a tile, by the padded head size and the type of the products: powers of two, at least 16."""
    if dtype == torch.float32:  # exact products run on the ordinary units: small tiles
        return 32, 16
    return min(max(16384 // dim, 16), 128), min(max(8192 // dim, 16), 64)


def weigh(
    layer: LayerPages, batch: Batch, q: Tensor, scale: float, longest: int, lse: Tensor | None, into: Tensor | None
) -> Tensor:
    """See api.weigh."""
    kv_heads, columns = layer.pages.shape[1:]
    group, dim = q.shape[1] // kv_heads, layer.kv.shape[-1]
    pairs = len(batch.rows) * kv_heads
    sums = into
    if sums is None:
        sums = torch.empty(len(batch.rows), kv_heads, longest, dtype=torch.float32, device=q.device)
    if pairs == 0 or longest == 0:
        return sums
    padded = max(1 << (dim - 1).bit_length(), 16)
    slots, rows = cut(padded, torch.promote_types(q.dtype, layer.kv.dtype))
    single = batch.longest == 1
    shape = {
        "H": kv_heads,
        "G": group,
        "D": dim,
        "DP": padded,
        "C": layer.page_size,
        "DOT": dot_type(q.dtype, layer.kv.dtype),
        "SLOTS": slots,
        "ROWS": max(triton.next_power_of_2(group), 16) if single else rows,
        "SINGLE": single,
        "FOLLOW": follow(q.device),
    }
    stored = (layer.kv, layer.pages.contiguous(), layer.lengths.contiguous(), batch.rows, batch.starts)
    q, scale = q.contiguous(), scale * LOG2_E.value
    launch = {"num_warps": 4, "num_stages": 3, **dependent(q.device)}
    with torch.cuda.device_of(q):
        if lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            tiles = triton.cdiv(batch.longest * group, shape["ROWS"])
            if tiles:
                _log_sum_exp[(pairs, tiles)](lse, q, *stored, scale, columns, **shape, **launch)
        shape["INTO"] = into is not None
        _weigh[(pairs, triton.cdiv(longest, slots))](
            sums, q, *stored, lse.contiguous(), scale, longest, columns, **shape, **launch
        )
    return sums


@triton.jit
def _pair(lengths, rows, starts, H: tl.constexpr, SINGLE: tl.constexpr):
    """Row (-1: padded), slots in use, first token and number of queries of this program's (sequence, head)."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(rows + sequence).to(tl.int64)
    length = tl.load(lengths + row * H + head, mask=row >= 0, other=0)
    if SINGLE:
        start, count = sequence.to(tl.int64), tl.full([], 1, tl.int32)
    else:
        start = tl.load(starts + sequence).to(tl.int64)
        count = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    return row, length, start, count


@triton.jit
def _keys(kv, table, slot, length, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr):
    """[slots, DP]: the keys of slots, 0 where padded and beyond the length."""
    d, live = tl.arange(0, DP)[None, :], slot < length
    page = tl.load(table + slot // C, mask=live, other=0).to(tl.int64)
    at = (page * (2 * C) + slot % C) * D
    return tl.load(kv + at[:, None] + d, mask=live[:, None] & (d < D), other=0.0).to(DOT)


@triton.jit
def _queries(q, at, live, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr):
    """[rows, DP]: the queries that lie `at` so many D from q, 0 where padded or not live."""
    d = tl.arange(0, DP)[None, :]
    return tl.load(q + at[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0).to(DOT)


@triton.jit
def _columns(
    key, slot, q, lse, first, start, count, behind, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[slots]: the sums of weights over query rows first .. first + ROWS - 1; query i sees slots 0 .. behind + i."""
    row = first + tl.arange(0, ROWS)
    query = row // G
    live = query < count
    at = ((start + query) * H + tl.program_id(0) % H) * G + row % G
    x = tl.dot(key, tl.trans(_queries(q, at, live, D, DP, DOT)), input_precision="ieee") * scale
    norm = tl.load(lse + at, mask=live, other=0.0) * LOG2_E
    seen = live[None, :] & (slot[:, None] <= behind + query[None, :])
    return tl.sum(tl.exp2(tl.where(seen, x - norm[None, :], -float("inf"))), 1)


@triton.jit(
    do_not_specialize=["pages", "lengths", "rows", "starts", "lse", "scale", "longest", "columns"],
)
def _weigh(
    sums, q, kv, pages, lengths, rows, starts, lse, scale, longest, columns,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SINGLE: tl.constexpr, FOLLOW: tl.constexpr, INTO: tl.constexpr,
):  # fmt: skip
    """INTO: sums is [P + 1, C] and is added to, each slot by one program; else [B, H, longest]."""
    if FOLLOW:
        take_turn()
    base = tl.program_id(1) * SLOTS
    slot = base + tl.arange(0, SLOTS)
    row, length, start, count = _pair(lengths, rows, starts, H, SINGLE)
    table = pages + (row * H + tl.program_id(0) % H) * columns
    total = tl.zeros([SLOTS], tl.float32)
    if base < length:
        key = _keys(kv, table, slot, length, D, DP, C, DOT)
        behind = length - count
        if SINGLE:
            total += _columns(key, slot, q, lse, 0, start, count, behind, scale, H, G, D, DP, DOT, ROWS)
        else:
            for first in range(tl.maximum(base - behind, 0) * G, count * G, ROWS):
                total += _columns(key, slot, q, lse, first, start, count, behind, scale, H, G, D, DP, DOT, ROWS)
    if INTO:
        live = slot < tl.minimum(length, longest)
        at = sums + tl.load(table + slot // C, mask=live, other=0).to(tl.int64) * C + slot % C
        tl.store(at, tl.load(at, mask=live, other=0.0) + total, mask=live)
    else:
        tl.store(sums + tl.program_id(0).to(tl.int64) * longest + slot, total, mask=slot < longest)


@triton.jit(do_not_specialize=["pages", "lengths", "rows", "starts", "scale", "columns"])
def _log_sum_exp(
    lse, q, kv, pages, lengths, rows, starts, scale, columns,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SINGLE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """Of query rows ROWS * program .. of one head; -inf where nothing is seen."""
    if FOLLOW:
        take_turn()
    row, length, start, count = _pair(lengths, rows, starts, H, SINGLE)
    first = tl.program_id(1) * ROWS
    if first >= count * G:
        return
    head, behind = tl.program_id(0) % H, length - count
    table = pages + (row * H + head) * columns
    tile = first + tl.arange(0, ROWS)
    query = tile // G
    live = query < count
    at = ((start + query) * H + head) * G + tile % G
    query_tile = _queries(q, at, live, D, DP, DOT)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(0, behind + tl.minimum((first + ROWS - 1) // G + 1, count), SLOTS):
        slot = base + tl.arange(0, SLOTS)
        key = _keys(kv, table, slot, length, D, DP, C, DOT)
        x = tl.dot(query_tile, tl.trans(key), input_precision="ieee") * scale
        x = tl.where(slot[None, :] <= behind + query[:, None], x, -float("inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
        top = new_top
    some = total > 0
    value = (top + tl.log2(tl.where(some, total, 1.0))) * LN_2
    tl.store(lse + at, tl.where(some, value, -float("inf")), mask=live)
