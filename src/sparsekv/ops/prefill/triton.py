"""prefill in Triton: one program per (block of a sequence's queries, KV head), online softmax over what it can see.

The queries of a block times the G query heads of one KV head form one tile, so that each key is read once per group.
Marks differ by KV head, so the work falls with the ratio only where unmarked keys lie together (`compact`). A block
whose first query is chunk token `first` picks an s <= max(0, first - window + 1) and meets every visible key once:

    1  stored slots that no token will take      seen by all queries
    2  stored slots of marked ring tokens        seen by query i iff i < expiry
    3  packed unmarked chunk keys before s       seen by all queries; the marked ones have expired for all
    4  chunk keys from s on                      by the rule: p <= i < expiry, expiry = p + window if marked, else never

Positions count from the chunk's first token. Nothing here waits for the device, and no length is compiled in.
"""

# triton.jit's types know no returned tuples.
# pyright: reportGeneralTypeIssues=false

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.device import shared_memory
from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.layout import Batch, LayerPages
from sparsekv.ops.prefill.compact import aligned, block_of, index_ring, most_blocks, pack_kept, strides

NEVER = tl.constexpr(2**31 - 1)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # the first running maximum: finite, so that a row that sees nothing yet weighs 0, not NaN


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """How the attention kernel is cut. All fields are fixed when it is compiled; none depends on lengths."""

    rows: int = 128
    """Queries times query heads per KV head in a tile, a power of two, at least 16 and the group."""
    keys: int = 128
    """Chunk keys in a tile, a power of two, at least 16."""
    slots: int = 64
    """Stored slots in a tile, likewise: each costs its own address."""
    warps: int = 8
    stages: int = 2


class _Chunk(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    marks: Tensor | None


class _Strides(NamedTuple):
    q: tuple[int, int]
    k: tuple[int, int]
    v: tuple[int, int]
    kept_k: tuple[int, int]
    kept_v: tuple[int, int]


def config_of(dim: int, dtype: torch.dtype, group: int, *, device: torch.device) -> PrefillConfig:
    """The configuration for a head size, a storage type and a group: as many tiles in flight as shared memory
    holds (64 keys and 4 stages did best of 16 on an H100 at head size 128, but for long texts at ratio 1)."""
    if dtype == torch.float32:  # exact products run on the ordinary units: small tiles
        return PrefillConfig(rows=max(32, _power_of_2(group)), keys=32, slots=32, warps=4)
    rows = max(128, _power_of_2(group))
    for keys, stages in ((64, 4), (64, 3), (64, 2), (32, 2)):
        if (rows + 2 * stages * keys) * _power_of_2(dim) * dtype.itemsize + 4096 <= shared_memory(device):
            break
    return PrefillConfig(rows=rows, keys=keys, slots=keys, stages=stages)


def obstacle(layer: LayerPages, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels cannot run, as the end of a sentence; None if they can."""
    kinds = {x.dtype for x in (q, k, v, layer.kv)}
    if not kinds <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"needs bfloat16, float16 or float32, not {', '.join(sorted(map(str, kinds)))}"
    if q.shape[-1] % 16:
        return f"needs a head size that is a multiple of 16, not {q.shape[-1]}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no backward, so call it under torch.no_grad()"
    return None


def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    marks: Tensor | None,
    return_lse: bool,
    config: PrefillConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See api.prefill. The scale must be positive: the running maximum is taken before it."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    heads, dim = k.shape[1:]
    group = q.shape[1] // heads
    if q.numel() == 0 or batch.longest == 0:
        return out, lse
    config = config or config_of(dim, q.dtype, group, device=q.device)
    q, k, v = aligned(q), aligned(k), aligned(v)
    marks = None if marks is None else marks.contiguous()
    options = {
        "D": dim,
        "DP": _power_of_2(dim),
        "C": layer.page_size,
        "GROUP": group,
        "ROWS": config.rows,
        "KEYS": config.keys,
        "SLOTS": config.slots,
        "DOT": dot_type(q.dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    with torch.cuda.device_of(q):
        ring = index_ring(layer, batch)
        kept = pack_kept(layer, batch, k, v, marks)
        _attend[(most_blocks(batch, len(q), config.rows // group), heads)](
            out,
            lse,
            _Chunk(q, k, v, marks),
            kept,
            ring,
            layer.kv,
            layer.pages.contiguous(),
            layer.lengths.contiguous(),
            layer.seen,
            batch.rows,
            batch.starts,
            len(batch.rows),
            _Strides(*(strides(x) for x in (q, k, v, kept.k, kept.v))),
            scale * math.log2(math.e),
            layer.window,
            layer.pages.shape[-1],
            **options,
        )
    return out, lse


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@triton.jit
def _rows(base, offset, live, D: tl.constexpr, DP: tl.constexpr):
    """Rows of D elements at base + offset [n]: [n, DP], 0 beyond D and where not live (None: all are)."""
    dim = tl.arange(0, DP)[None, :]
    at = base + (offset[:, None] + dim)
    if live is not None:
        return tl.load(at, mask=live[:, None] & (dim < D), other=0.0)
    elif DP != D:
        return tl.load(at, mask=dim < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _slot_rows(page, slot, C: tl.constexpr, D: tl.constexpr):
    """int64: where the keys of slots start that lie in these pages; their values start C * D later."""
    return (page.to(tl.int64) * (2 * C) + slot % C) * D


@triton.jit
def _step(state, q, k, v, seen, scale, DOT: tl.constexpr):
    """One step of online softmax in base 2. seen: bool, broadcast to [rows, keys]; None: all."""
    acc, total, top = state
    x = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")
    if seen is not None:
        x = tl.where(seen, x, -float("inf"))
    new_top = tl.maximum(top, tl.max(x, 1) * scale)
    p = tl.exp2(x * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(p.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def _span(
    state, q, k, v, k_stride, v_stride, low, high, scale,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Steps over keys low .. high - 1, whole tiles that all queries see: the fast path."""
    key = tl.arange(0, KEYS)
    k_wide, v_wide = k_stride.to(tl.int64), v_stride.to(tl.int64)
    for lo in range(low, high, KEYS):
        tile_k = _rows(k + lo * k_wide, key * k_stride, None, D, DP)
        tile_v = _rows(v + lo * v_wide, key * v_stride, None, D, DP)
        state = _step(state, q, tile_k, tile_v, None, scale, DOT)
    return state


@triton.jit
def _stored(
    state, q, query, first, stored, ring, sequence, row, window, scale,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Parts 1 and 2. Which page a slot lies in, and what else must be known of it, is looked up one tile ahead."""
    kv, pages, lengths, seen, columns = stored
    WORDS: tl.constexpr = (C + 31) // 32
    head, heads = tl.program_id(1), tl.num_programs(1)
    pair = row * heads + head
    table = pages + pair * columns
    length = tl.load(lengths + pair)
    pair = (sequence * heads + head).to(tl.int64)
    slot = tl.arange(0, KEYS)
    page = tl.load(table + slot // C, mask=slot < length, other=0)
    word = page
    if ring.bits is not None:
        bits = ring.bits + pair * (columns * WORDS)
        word = tl.load(bits + slot // 32, mask=slot < length, other=0)
    for lo in range(0, length, KEYS):
        slot = lo + tl.arange(0, KEYS)
        live = slot < length
        at = _slot_rows(page, slot, C, D)
        k, v = _rows(kv, at, live, D, DP), _rows(kv + C * D, at, live, D, DP)
        if ring.bits is not None:
            live &= ((word >> (slot % 32)) & 1) == 0
        slot += KEYS
        page = tl.load(table + slot // C, mask=slot < length, other=0)
        if ring.bits is not None:
            word = tl.load(bits + slot // 32, mask=slot < length, other=0)
        state = _step(state, q, k, v, live[None, :], scale, DOT)
    if ring.bits is not None:
        ages = tl.minimum(tl.load(seen + row), window - 1 - first)
        count = tl.load(ring.below + pair * window + ages, mask=ages > 0, other=0)
        key = tl.arange(0, KEYS)
        for lo in range(0, count, KEYS):
            live = lo + key < count
            slot = tl.load(ring.slots + pair * window + lo + key, mask=live, other=0)
            expiry = tl.load(ring.expiry + pair * window + lo + key, mask=live, other=0)
            page = tl.load(table + slot // C, mask=live, other=0)
            at = _slot_rows(page, slot, C, D)
            k, v = _rows(kv, at, live, D, DP), _rows(kv + C * D, at, live, D, DP)
            state = _step(state, q, k, v, query[:, None] < expiry[None, :], scale, DOT)
    return state


@triton.jit
def _kept(
    state, q, kept, stride, start, count, scale,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Part 3: the first `count` packed keys of the sequence."""
    head = tl.program_id(1).to(tl.int64)
    k = kept.k + start * stride.kept_k[0] + head * stride.kept_k[1]
    v = kept.v + start * stride.kept_v[0] + head * stride.kept_v[1]
    full = count // KEYS * KEYS
    state = _span(state, q, k, v, stride.kept_k[0], stride.kept_v[0], 0, full, scale, D, DP, KEYS, DOT)
    if full < count:
        token = full + tl.arange(0, KEYS)
        live = token < count
        tile_k = _rows(k, token * stride.kept_k[0].to(tl.int64), live, D, DP)
        tile_v = _rows(v, token * stride.kept_v[0].to(tl.int64), live, D, DP)
        state = _step(state, q, tile_k, tile_v, live[None, :], scale, DOT)
    return state


@triton.jit
def _recent(
    state, q, query, first, last, s, chunk, stride, start, window, scale,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Part 4. From `low` to `high` every key is in the window of every query: only the edges need a mask."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    k = chunk.k + start * stride.k[0] + head.to(tl.int64) * stride.k[1]
    v = chunk.v + start * stride.v[0] + head.to(tl.int64) * stride.v[1]
    low = s
    if chunk.marks is not None:
        low += tl.cdiv(tl.maximum(last - window + 1 - s, 0), KEYS) * KEYS
    high = low + tl.maximum(first - low, 0) // KEYS * KEYS
    state = _span(state, q, k, v, stride.k[0], stride.v[0], low, high, scale, D, DP, KEYS, DOT)
    for edge in range(0, low - s + tl.maximum(last + 1 - high, 0), KEYS):
        p = tl.where(edge < low - s, s, high - (low - s)) + edge + tl.arange(0, KEYS)
        live = p <= last
        tile_k = _rows(k, p * stride.k[0].to(tl.int64), live, D, DP)
        tile_v = _rows(v, p * stride.v[0].to(tl.int64), live, D, DP)
        seen = p[None, :] <= query[:, None]
        if chunk.marks is not None:
            mark = tl.load(chunk.marks + (start + p) * heads + head, mask=live, other=0)
            seen &= query[:, None] < tl.where(mark != 0, p + window, NEVER)[None, :]
        state = _step(state, q, tile_k, tile_v, seen, scale, DOT)
    return state


@triton.jit(
    do_not_specialize=["lse", "pages", "lengths", "seen", "rows", "starts", "sequences", "scale", "window", "columns"]
)
def _attend(
    out, lse, chunk, kept, ring, kv, pages, lengths, seen, rows, starts, sequences, stride, scale, window, columns,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // GROUP
    head, heads = tl.program_id(1), tl.num_programs(1)
    sequence, first = block_of(starts, sequences, tl.program_id(0), QUERIES)
    if first < 0:
        return
    start = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    tile = tl.arange(0, ROWS)
    query = first + tile // GROUP
    real = (tile < QUERIES * GROUP) & (query < count)
    q_head = head * GROUP + tile % GROUP
    dim = tl.arange(0, DP)[None, :]
    at = (start + query) * (heads * GROUP) + q_head
    out_at = out + at[:, None] * D + dim
    out_mask = real[:, None] & (dim < D)
    row = tl.load(rows + sequence)
    if row < 0:
        tl.store(out_at, tl.zeros([ROWS, DP], tl.float32).to(out.dtype.element_ty), mask=out_mask)
        if lse is not None:
            tl.store(lse + at, tl.full([ROWS], -float("inf"), tl.float32), mask=real)
        return

    q = _rows(chunk.q, (start + query) * stride.q[0] + q_head.to(tl.int64) * stride.q[1], real, D, DP).to(DOT)
    last = tl.minimum(first + QUERIES, count) - 1
    if chunk.marks is None:
        s = first // KEYS * KEYS
        before = s
    else:
        recent = tl.cdiv(window - 1 + QUERIES, KEYS) * KEYS  # whole tiles, since they are paid for
        s = tl.maximum(first + QUERIES - recent, 0)
        before = tl.load(kept.before + (start + s) * heads + head, mask=s > 0, other=0)

    state = (tl.zeros([ROWS, DP], tl.float32), tl.zeros([ROWS], tl.float32), tl.full([ROWS], LOWEST, tl.float32))
    stored = (kv, pages, lengths, seen, columns)
    state = _stored(state, q, query, first, stored, ring, sequence, row, window, scale, D, DP, C, SLOTS, DOT)
    state = _kept(state, q, kept, stride, start, before, scale, D, DP, KEYS, DOT)
    state = _recent(state, q, query, first, last, s, chunk, stride, start, window, scale, D, DP, KEYS, DOT)
    acc, total, top = state
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=out_mask)
    if lse is not None:
        tl.store(lse + at, (top + tl.log2(total)) * LN_2, mask=real)
