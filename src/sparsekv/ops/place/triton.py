"""place in Triton: the ring rule, page allocation and the write of K and V, without the host.

A decode step is one launch, a program per (sequence, head): it makes its mark, finds its slot, takes a page if it must
and writes. Many tokens are two launches: `_plan`, a program per (sequence, head), walks the chunk in tiles and finds
the slot of every survivor; `_copy` moves K and V to those slots in parallel.

A page is taken by one atomic subtraction from `free_count`: the ids between the new and the old count are the taker's.
A taker that finds too few writes nothing and leaves the count negative, for the host to see when it next looks.

`seen` is shared by a row's heads. Each program adds COUNT to it, which returns the value and, in the bits above, how
many heads came before; the last to come stores the new value, when all others have the old one.
"""

# triton.jit's types know no launch options and no starred arguments.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.launch import dependent, follow, take_turn
from sparsekv.ops.layout import Batch, LaterMarks, LayerPages, LinearMarks

SEEN_BITS = 24
COUNT = tl.constexpr(1 << SEEN_BITS)
MAX_HEADS = 2 ** (31 - SEEN_BITS) - 1
TILE = 256
"""Tokens, ring entries or pages at a time."""
FREE = ["rows", "pages", "lengths", "ring", "seen", "free", "free_count", "columns", "window"]
"""Arguments of every kernel here that must not be specialised."""


def obstacle(layer: LayerPages) -> str | None:
    """Why these kernels cannot run, as the end of a sentence; None if they can."""
    heads, columns = layer.pages.shape[1:]
    if heads > MAX_HEADS:
        return f"takes at most {MAX_HEADS} KV heads, not {heads}"
    if columns * layer.page_size >= 2**SEEN_BITS:
        return f"takes sequences below {2**SEEN_BITS} tokens, and the page tables hold {columns * layer.page_size}"
    return None


def place_one(
    layer: LayerPages,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    marks: Tensor | LinearMarks | LaterMarks | None,
    slots: Tensor | None,
) -> None:
    """One token for each of rows [B], -1 for none: k, v [B, H, D]; marks bool [B, H]; slots int32 [B, H] or None."""
    batch, heads, dim = k.shape
    k, v = _inner_contiguous(k), _inner_contiguous(v)
    linear = isinstance(marks, LinearMarks)
    given = isinstance(marks, Tensor)
    kind = "linear" if linear else "given" if given else "none" if marks is None else "later"
    size = marks.hidden.shape[1] if linear else 1
    inputs = (marks.hidden.contiguous(), marks.weight.contiguous(), marks.bias, marks.offset) if linear else (k,) * 4
    _place_one[(batch, heads)](
        *_tensors(layer), rows, k, v, marks.contiguous() if given else k,
        k if slots is None else slots.contiguous(), *inputs,
        k.stride(0), v.stride(0), layer.pages.shape[-1], layer.window, size,
        marks.first if isinstance(marks, LaterMarks) else 0,
        H=heads, D=dim, DP=triton.next_power_of_2(dim), C=layer.page_size, EP=min(triton.next_power_of_2(size), 4096),
        MARKS=kind, SLOTS=slots is not None, FOLLOW=follow(k.device), num_warps=4, **dependent(k.device),
    )  # fmt: skip


def place_many(layer: LayerPages, batch: Batch, k: Tensor, v: Tensor, marks: Tensor | None) -> None:
    """Any number of tokens for each of batch.rows: k, v [T, H, D]; marks bool [T, H] or None."""
    tokens, heads, dim = k.shape
    sequences, window, device = batch.rows.shape[0], layer.window, k.device
    if tokens == 0 or sequences == 0:
        return
    k, v = _inner_contiguous(k), _inner_contiguous(v)
    target = torch.full((tokens, heads), -1, dtype=torch.int64, device=device)
    freed = torch.empty(sequences, heads, window, dtype=torch.int32, device=device)
    kv, *index = _tensors(layer)
    _plan[(sequences, heads)](
        *index, batch.rows, batch.starts, target if marks is None else marks.contiguous(), target, freed,
        layer.pages.shape[-1], window, H=heads, C=layer.page_size, MARKED=marks is not None, TILE=TILE, num_warps=4,
    )  # fmt: skip
    rows_per_program = 32
    _copy[(triton.cdiv(tokens, rows_per_program), heads)](
        kv, target, k, v, tokens, k.stride(0), v.stride(0),
        H=heads, D=dim, DP=triton.next_power_of_2(dim), C=layer.page_size, BLOCK=rows_per_program, num_warps=4,
    )  # fmt: skip


def _tensors(layer: LayerPages) -> tuple[Tensor, ...]:
    tensors = layer.kv, layer.pages, layer.lengths, layer.ring, layer.seen, layer.free, layer.free_count
    assert all(t.is_contiguous() for t in tensors), "place writes in place: the layer's tensors must be contiguous"
    return tensors


def _inner_contiguous(x: Tensor) -> Tensor:
    """x [T, H, D] with any distance between tokens."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@triton.jit
def _advance(seen, row, count, H: tl.constexpr):
    """The tokens that row had seen; the last head to ask adds count to them."""
    old = tl.atomic_add(seen + row, COUNT, sem="relaxed")
    before = old & (COUNT - 1)
    if old // COUNT == H - 1:
        tl.store(seen + row, before + count)
    return before


@triton.jit
def _take(free_count, needed, room):
    """Take pages: (index of the first in the stack, whether there are so many and the page table has room)."""
    first = tl.atomic_add(free_count, -needed, sem="relaxed") - needed
    if not room:
        tl.atomic_min(free_count, -1, sem="relaxed")
    return first, (first >= 0) & room


@triton.jit
def _linear_mark(hidden, weight, bias, offset, token, head, size, EP: tl.constexpr):
    total = tl.zeros([EP], tl.float32)
    for base in range(0, size, EP):
        e = base + tl.arange(0, EP)
        x = tl.load(hidden + token.to(tl.int64) * size + e, mask=e < size, other=0.0).to(tl.float32)
        w = tl.load(weight + head.to(tl.int64) * size + e, mask=e < size, other=0.0).to(tl.float32)
        total += x * w
    z = tl.sum(total) + tl.load(bias + head).to(tl.float32) + tl.load(offset)
    return (z > 0).to(tl.int32)


@triton.jit(do_not_specialize=[*FREE, "marks", "slots", "unmarked"])
def _place_one(
    kv, pages, lengths, ring, seen, free, free_count, rows, k, v, marks, slots, hidden, weight, bias, offset,
    k_stride, v_stride, columns, window, size, unmarked,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, EP: tl.constexpr,
    MARKS: tl.constexpr, SLOTS: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    if FOLLOW:
        take_turn()
    # Whatever needs no answer of another load is asked for first: the kernel is a chain of latencies.
    d = tl.arange(0, DP)
    key = tl.load(k + token.to(tl.int64) * k_stride + head * D + d, mask=d < D)
    value = tl.load(v + token.to(tl.int64) * v_stride + head * D + d, mask=d < D)
    row = tl.load(rows + token).to(tl.int64)
    if row < 0:
        return
    pair = row * H + head
    length = tl.load(lengths + pair)
    if MARKS == "linear":
        mark = _linear_mark(hidden, weight, bias, offset, token, head, size, EP)
    elif MARKS == "given":
        mark = tl.load(marks + token * H + head).to(tl.int32)
    else:
        mark = 0
    position = _advance(seen, row, 1, H)
    if MARKS == "later":
        mark = (position >= unmarked).to(tl.int32)

    slot = length
    entry = ring + pair * window
    if window > 0:
        entry += position % window
        if SLOTS == 0:
            oldest = tl.load(entry)
            slot = tl.where((oldest & 1 == 1) & (position >= window), oldest >> 1, slot)
    if SLOTS:
        chosen = tl.load(slots + token * H + head)
        slot = tl.where((chosen >= 0) & (chosen < length), chosen, slot)

    column = slot // C
    if (slot == length) & (slot % C == 0):
        first, fits = _take(free_count, 1, column < columns)
        page = tl.load(free + first, mask=fits, other=0)
        tl.store(pages + pair * columns + column, page, mask=fits)
    else:
        fits = column < columns
        page = tl.load(pages + pair * columns + column, mask=fits, other=0)
    tl.debug_barrier()  # every warp has read length and ring before one warp writes them
    if fits:
        at = kv + (page.to(tl.int64) * (2 * C) + slot % C) * D + d
        tl.store(at, key, mask=d < D)
        tl.store(at + C * D, value, mask=d < D)
        tl.store(lengths + pair, tl.maximum(length, slot + 1))
        if window > 0:
            tl.store(entry, slot << 1 | mark)


@triton.jit
def _expired(entry, index, before, end, window):
    """Ring entries `index`: their slots, and whether they are of marked tokens that no query from end - 1 on sees."""
    position = before - 1 - (before - 1 - index + window) % window
    value = tl.load(entry + index, mask=index < window, other=0)
    gone = (index < window) & (position >= 0) & (position < end - window) & (value & 1 == 1)
    return value >> 1, gone.to(tl.int32)


@triton.jit
def _survivors(marks, token, stop, position, end, window, head, H: tl.constexpr, MARKED: tl.constexpr):
    """Marks of tokens, and whether they are stored: all but marked ones that no later query sees."""
    mark = tl.zeros_like(token)
    if MARKED:
        mark = tl.load(marks + token.to(tl.int64) * H + head, mask=token < stop, other=0).to(tl.int32)
    alive = (token < stop) & ((mark == 0) | (position >= end - window))
    return mark, alive.to(tl.int32)


@triton.jit(do_not_specialize=[*FREE, "starts", "marks", "target", "freed"])
def _plan(
    pages, lengths, ring, seen, free, free_count, rows, starts, marks, target, freed, columns, window,
    H: tl.constexpr, C: tl.constexpr, MARKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """target int64 [T, H]: where a token's key goes, in units of D elements; -1 where it is not stored."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + sequence).to(tl.int64)
    start, stop = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    if (row < 0) | (start >= stop):
        return
    before = _advance(seen, row, stop - start, H)
    end = before + stop - start
    pair = row * H + head
    lane = tl.arange(0, TILE)
    length = tl.load(lengths + pair)
    entry = ring + pair * window
    reuse = freed + (sequence.to(tl.int64) * H + head) * window

    # Slots of expired tokens, listed; then how many tokens come.
    count = 0
    for base in range(0, window, TILE):
        slot, gone = _expired(entry, base + lane, before, end, window)
        tl.store(reuse + count + tl.cumsum(gone, 0) - 1, slot, mask=gone == 1)
        count += tl.sum(gone)
    new = 0
    for base in range(start, stop, TILE):
        token = base + lane
        _, alive = _survivors(marks, token, stop, before + token - start, end, window, head, H, MARKED)
        new += tl.sum(alive)

    new_length = length + new - count
    have, want = tl.cdiv(length, C), tl.cdiv(new_length, C)
    first, fits = _take(free_count, want - have, want <= columns)
    if not fits:
        return
    table = pages + pair * columns
    for base in range(have, want, TILE):
        column = base + lane
        page = tl.load(free + first + column - have, mask=column < want, other=0)
        tl.store(table + column, page, mask=column < want)
    tl.store(lengths + pair, new_length)
    tl.debug_barrier()  # the lists above, written by other threads of this program, are read below

    rank = 0
    for base in range(start, stop, TILE):
        token = base + lane
        position = before + token - start
        mark, alive = _survivors(marks, token, stop, position, end, window, head, H, MARKED)
        order = rank + tl.cumsum(alive, 0) - 1
        again = (alive == 1) & (order < count)
        slot = tl.where(again, tl.load(reuse + order, mask=again, other=0), length + order - count)
        page = tl.load(table + slot // C, mask=alive == 1, other=0).to(tl.int64)
        tl.store(target + token.to(tl.int64) * H + head, page * (2 * C) + slot % C, mask=alive == 1)
        in_ring = (alive == 1) & (position >= end - window)
        tl.store(entry + position % tl.maximum(window, 1), slot << 1 | mark, mask=in_ring)
        rank += tl.sum(alive)


@triton.jit(do_not_specialize=["target", "tokens"])
def _copy(
    kv, target, k, v, tokens, k_stride, v_stride,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row = tl.load(target + token.to(tl.int64) * H + head, mask=token < tokens, other=-1)
    d = tl.arange(0, DP)[None, :]
    mask = (row >= 0)[:, None] & (d < D)
    at = kv + row[:, None] * D + d
    token = token.to(tl.int64)[:, None]
    tl.store(at, tl.load(k + token * k_stride + head * D + d, mask=mask, other=0.0), mask=mask)
    tl.store(at + C * D, tl.load(v + token * v_stride + head * D + d, mask=mask, other=0.0), mask=mask)
