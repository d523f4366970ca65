"""decode as one persistent Triton kernel: any lengths, no host synchronisation, a grid that never changes.

All heads' slots are laid end to end, in units of 16, and cut into equal shares, one a program: each program finds its
share from the lengths by itself, so that heads of very different lengths keep all processors equally busy (Stream-K,
arXiv 2301.03598, applied to attention). A head inside one share is finished there. Of a head cut into pieces, each
piece leaves its output and log2-sum-exp2; the program that arrives last merges them, the maximum subtracted, and puts
the head's ticket back to zero. A head with nothing stored is one unit, so that its zeros are written.

Scores are in base 2: x = scale * log2(e) * q . k.
"""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.device import processors
from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.launch import dependent, follow, take_turn
from sparsekv.ops.layout import LayerPages

UNIT = tl.constexpr(16)
"""Slots a unit of work."""
MOST_LANES = 1024
"""Heads whose lengths are read at once."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the kernel is cut. All fields are fixed when it is compiled; none depends on lengths."""

    block: int = 64
    """Slots a tile, a power of two, at least 16."""
    warps: int = 4
    stages: int = 5
    """Keys are found through page ids, so that a tile in flight takes two stages: 3 hold one tile, 5 two, 7 three."""
    programs: int = 3
    """Programs per multiprocessor, all there at once: they share its registers, and must share its shared memory."""
    least: int = 128
    """Slots a program takes at least: fewer pieces to merge where there is little to read."""


CONFIGS = {
    128: DecodeConfig(programs=4),
    256: DecodeConfig(block=32, programs=2, least=256),
    512: DecodeConfig(block=32, programs=2),
    1024: DecodeConfig(block=16, programs=2),
}
"""By the bytes of one key, padded to a power of two. That of 256 bytes was tuned on an H100, that of 128 on an H200."""


def config_of(dim: int, dtype: torch.dtype) -> DecodeConfig:
    """The tuned configuration for a head size and a storage type."""
    size = 1 << (dim * dtype.itemsize - 1).bit_length()
    return CONFIGS[min(max(size, min(CONFIGS)), max(CONFIGS))]


def obstacle(layer: LayerPages, q: Tensor) -> str | None:
    """Why these kernels cannot run, as the end of a sentence; None if they can."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if layer.kv.dtype not in kinds or q.dtype not in kinds:
        return f"needs bfloat16, float16 or float32, not {q.dtype} queries over {layer.kv.dtype} pages"
    if layer.page_size & (layer.page_size - 1):
        return f"needs a page size that is a power of two, not {layer.page_size}"
    return None


def decode(
    layer: LayerPages, rows: Tensor, q: Tensor, scale: float, config: DecodeConfig | None
) -> tuple[Tensor, Tensor]:
    """See api.decode: out and lse."""
    dim, page_size = layer.kv.shape[-1], layer.page_size
    kv_heads, columns = layer.pages.shape[1:]
    group = q.shape[1] // kv_heads
    heads = q.shape[0] * kv_heads
    config = config or config_of(dim, layer.kv.dtype)
    q, pages, lengths = q.contiguous(), layer.pages.contiguous(), layer.lengths.contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if heads == 0:
        return out, lse
    programs = config.programs * processors(q.device)
    scratch = torch.empty(2 * programs * group * (dim + 1), dtype=torch.float32, device=q.device)
    tickets = torch.zeros_like(lengths) if layer.tickets is None else layer.tickets
    shape = {
        "H": kv_heads,
        "G": group,
        "GP": max(triton.next_power_of_2(group), 16),
        "D": dim,
        "DP": max(triton.next_power_of_2(dim), 16),
        "C": page_size,
        "DOT": dot_type(q.dtype, layer.kv.dtype),
        "BLOCK": config.block,
    }
    scale *= LOG2_E.value
    merge_rows = triton.next_power_of_2(group)
    step = max(1, min(32, 8192 // (merge_rows * shape["DP"])))
    _decode[(programs,)](
        q, layer.kv, pages, lengths, rows, out, lse, scratch, tickets, scale, heads, columns, config.least,
        **shape, MP=merge_rows, STEP=step,
        LANES=min(max(triton.next_power_of_2(heads), 16), MOST_LANES), ONCE=heads <= MOST_LANES,
        FOLLOW=follow(q.device),
        num_warps=config.warps, num_stages=config.stages, maxnreg=_registers(config), **dependent(q.device),
    )  # fmt: skip
    return out, lse


def _registers(config: DecodeConfig) -> int:
    """A thread's share of a multiprocessor's 64K registers, so that all programs are resident."""
    return min(65536 // (config.programs * config.warps * 32) // 8 * 8, 255)


@triton.jit
def _length(lengths, rows, head, H: tl.constexpr, inside):
    """The row (-1: padded) and the length of head 0 .. B * H - 1 of the call."""
    row = tl.load(rows + head // H, mask=inside, other=-1).to(tl.int64)
    return row, tl.load(lengths + row * H + head % H, mask=row >= 0, other=0)


@triton.jit
def _units(lengths, rows, head, H: tl.constexpr, heads):
    """Units of work of each head, at least one; 0 beyond the last head."""
    _, length = _length(lengths, rows, head, H, head < heads)
    return tl.where(head < heads, tl.maximum(tl.cdiv(length, UNIT), 1), 0)


@triton.jit
def _query(q, head, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr):
    """[GP, DP]: the queries of one head, zero where padded."""
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    return tl.load(q + (head.to(tl.int64) * G + g) * D + d, mask=(g < G) & (d < D), other=0.0).to(DOT)


@triton.jit
def _slot_rows(table, slot, live, C: tl.constexpr):
    """int64: where keys of slots start, in units of D elements; their values start C later."""
    page = tl.load(table + slot // C, mask=live, other=0).to(tl.int64)
    return page * (2 * C) + slot % C


@triton.jit
def _attend(
    query, kv, table, low, high, scale,
    GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax over slots low .. high - 1: values [GP, DP] not yet divided by the sum [GP], and the maximum [GP]."""
    d = tl.arange(0, DP)[None, :]
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for base in range(low, high, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        live = slot < high
        at = _slot_rows(table, slot, live, C)[:, None] * D + d
        mask = live[:, None] & (d < D)
        key = tl.load(kv + at, mask=mask, other=0.0).to(DOT)
        x = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        x = tl.where(live[None, :], x, -float("inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - new_top[:, None])
        decay = tl.exp2(top - new_top)
        value = tl.load(kv + at + C * D, mask=mask, other=0.0).to(DOT)
        acc = acc * decay[:, None] + tl.dot(p.to(DOT), value, input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit
def _merge(
    scratch, lse_at, first, pieces,
    G: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Softmax over the pieces that programs first .. first + pieces - 1 left: as _attend."""
    g, d = tl.arange(0, MP), tl.arange(0, DP)
    top = tl.full([MP], -float("inf"), tl.float32)
    total = tl.zeros([MP], tl.float32)
    acc = tl.zeros([MP, DP], tl.float32)
    for base in range(0, pieces, STEP):
        piece = base + tl.arange(0, STEP)
        at = (2 * (first + piece) + (piece == 0).to(tl.int32))[:, None] * G + g[None, :]
        live = (piece < pieces)[:, None] & (g < G)[None, :]
        # .cg: other processors wrote these, so this one's own cache must not answer.
        x = tl.load(scratch + lse_at + at, mask=live, other=0.0, cache_modifier=".cg")
        x = tl.where((piece < pieces)[:, None], x, -float("inf"))
        mask = live[:, :, None] & (d < D)[None, None, :]
        part = tl.load(scratch + at[:, :, None] * D + d[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(x, 0))
        p = tl.exp2(x - new_top[None, :])
        decay = tl.exp2(top - new_top)
        acc = acc * decay[:, None] + tl.sum(part * p[:, :, None], 0)
        total = total * decay + tl.sum(p, 0)
        top = new_top
    return acc, total, top


@triton.jit
def _finish(out, lse, head, acc, total, top, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Write one head's output and log-sum-exp; 0 and -inf where nothing is stored."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)[None, :]
    at = head.to(tl.int64) * G + g
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(out + at[:, None] * D + d, acc / total[:, None], mask=(g < G)[:, None] & (d < D))
    tl.store(lse + at, tl.where(some, (top + tl.log2(total)) * LN_2, -float("inf")), mask=g < G)


@triton.jit(
    do_not_specialize=["rows", "lengths", "pages", "tickets", "lse", "scale", "heads", "columns", "least"],
)
def _decode(
    q, kv, pages, lengths, rows, out, lse, scratch, tickets, scale, heads, columns, least,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, MP: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr, ONCE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    if FOLLOW:
        take_turn()
    lane = tl.arange(0, LANES)

    total_units = 0
    units = _units(lengths, rows, lane, H, heads)
    if ONCE:
        total_units += tl.sum(units)
    else:
        for base in range(0, heads, LANES):
            total_units += tl.sum(_units(lengths, rows, base + lane, H, heads))
    share = tl.maximum(tl.cdiv(total_units, programs), least // UNIT)
    begin = program * share
    end = tl.minimum(begin + share, total_units)
    if begin >= end:
        return

    # The head in which `begin` lies, and that head's first unit.
    head, start, seen = 0, 0, 0
    if ONCE:
        before = tl.cumsum(units, 0) <= begin
        head += tl.sum((before & (lane < heads)).to(tl.int32))
        start += tl.sum(tl.where(before, units, 0))
    else:
        for base in range(0, heads, LANES):
            units = _units(lengths, rows, base + lane, H, heads)
            before = seen + tl.cumsum(units, 0) <= begin
            head += tl.sum(before.to(tl.int32))
            start += tl.sum(tl.where(before, units, 0))
            seen += tl.sum(units)

    g, d = tl.arange(0, GP), tl.arange(0, DP)[None, :]
    lse_at = 2 * programs * G * D
    at = begin
    while at < end:
        row, length = _length(lengths, rows, head, H, True)
        stop = start + tl.maximum(tl.cdiv(length, UNIT), 1)
        low = (at - start) * UNIT
        high = tl.minimum((tl.minimum(stop, end) - start) * UNIT, length)
        query = _query(q, head, G, GP, D, DP, DOT)
        table = pages + (row * H + head % H) * columns
        acc, total, top = _attend(query, kv, table, low, high, scale, GP, D, DP, C, DOT, BLOCK)
        if (start >= begin) & (stop <= end):
            _finish(out, lse, head, acc, total, top, G, GP, D, DP)
        else:
            piece = (2 * program + (start >= begin).to(tl.int32)) * G + g
            tl.store(scratch + piece[:, None] * D + d, acc / total[:, None], mask=(g < G)[:, None] & (d < D))
            tl.store(scratch + lse_at + piece, top + tl.log2(total), mask=g < G)
            tl.debug_barrier()  # all threads' stores come before the one thread's release
            first, last = start // share, (stop - 1) // share
            ticket = tickets + row * H + head % H
            if tl.atomic_add(ticket, 1, sem="acq_rel") == last - first:
                merged, sums, tops = _merge(scratch, lse_at, first, last - first + 1, G, MP, D, DP, STEP)
                _finish(out, lse, head, merged, sums, tops, G, MP, D, DP)
                tl.store(ticket, 0)
        at, start, head = stop, stop, head + 1
