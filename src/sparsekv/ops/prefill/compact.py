"""What the Triton prefill prepares, so that its inner loops meet no holes: two stable compactions on the device.

Marked ring tokens, by (sequence, head): their slots and expiries, newest first, and a bit per slot that tells the pass
over all stored slots to leave them out. `below[a]` counts those younger than age a, so that a block of queries knows
how many can still be visible to it.

Unmarked chunk tokens, by (sequence, head): their keys and values moved together. `before[t]` counts the unmarked tokens
of the sequence before chunk token t, so that a block of queries knows where its part of the packed keys ends.

Positions count from the chunk's first token; a ring token of age a (0 = the newest) expires at window - 1 - a.
"""

# triton.jit's types know no returned tuples.
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages

SCAN = tl.constexpr(1024)
SEQUENCES = tl.constexpr(256)
"""Sequences looked at together to find a block's own."""


class Ring(NamedTuple):
    """The marked tokens of the ring. W = 0: all None."""

    bits: Tensor | None
    """int32 [B, H, M * ceil(C / 32)]: bit s % 32 of word s // 32 is set where slot s is one of them."""
    slots: Tensor | None
    """int32 [B, H, W], of which the first so many are valid."""
    expiry: Tensor | None
    """int32 [B, H, W]: the first chunk position that no longer sees the slot."""
    below: Tensor | None
    """int32 [B, H, W]: how many are younger than age a."""


class Kept(NamedTuple):
    """The unmarked keys and values of the chunk: sequence i's lie from token starts[i] on."""

    k: Tensor
    """[T, H, D]."""
    v: Tensor
    """[T, H, D]."""
    before: Tensor | None
    """int32 [T, H]: unmarked tokens of the sequence before this one; None where no marks are given: k and v stay."""


def most_blocks(batch: Batch, tokens: int, size: int) -> int:
    """At least the blocks of `size` tokens that the sequences of a call are cut into, each on its own; tokens: T."""
    sequences = len(batch.rows)
    return min(-(-batch.longest // size) * sequences, tokens // size + sequences)


@triton.jit
def block_of(starts, sequences, index, SIZE: tl.constexpr):
    """The sequence of block `index`, and the first token of the block, counted from the sequence's own. The blocks of a
    sequence follow each other, the last first: those with the most to see begin first. Beyond the last block: -1 for
    the first token."""
    before = 0  # blocks of sequences looked at
    sequence = 0  # those whose blocks all lie before this one
    end = 2147483647  # of the blocks of the block's own sequence
    for base in range(0, sequences, SEQUENCES):
        i = base + tl.arange(0, SEQUENCES)
        inside = i < sequences
        tokens = tl.load(starts + i + 1, mask=inside, other=0) - tl.load(starts + i, mask=inside, other=0)
        blocks = tl.cdiv(tokens, SIZE)
        ends = before + tl.cumsum(blocks)
        sequence += tl.sum((inside & (ends <= index)).to(tl.int32))
        end = tl.minimum(end, tl.min(tl.where(ends > index, ends, 2147483647)))
        before += tl.sum(blocks)
    first = tl.where(index < before, (end - 1 - index) * SIZE, -1)
    return sequence, first


def strides(x: Tensor) -> tuple[int, int]:
    """(token, head) strides of x [T, heads, D], in elements; 0 where they do not matter. Multiples of 16, which the
    compiler relies on and which is why no length makes it compile again: see `aligned`."""
    token, head = x.stride()[:2]
    return token if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0


def aligned(x: Tensor) -> Tensor:
    """x [T, heads, D] itself where a kernel can read its rows, else a copy."""
    return x if x.stride(2) == 1 and all(stride % 16 == 0 for stride in strides(x)) else x.contiguous()


def index_ring(layer: LayerPages, batch: Batch) -> Ring:
    """Compact the marked ring entries of batch.rows: one launch (and one memset)."""
    if layer.window == 0:
        return Ring(None, None, None, None)
    shape = (len(batch.rows), layer.lengths.shape[1])
    words = layer.pages.shape[-1] * -(-layer.page_size // 32)
    bits = torch.zeros(*shape, words, dtype=torch.int32, device=layer.kv.device)
    slots, expiry, below = (bits.new_empty(*shape, layer.window) for _ in range(3))
    ring = Ring(bits, slots, expiry, below)
    _index_ring[(shape[1], shape[0])](ring, layer.ring.contiguous(), batch.rows, layer.seen, words, layer.window, SCAN)
    return ring


def pack_kept(layer: LayerPages, batch: Batch, k: Tensor, v: Tensor, marks: Tensor | None) -> Kept:
    """Move unmarked keys and values together: one launch, none where no query of the chunk outlives a window."""
    if marks is None:
        return Kept(k, v, None)
    packed_k, packed_v = torch.empty(2, *k.shape, dtype=k.dtype, device=k.device)
    kept = Kept(packed_k, packed_v, torch.empty_like(marks, dtype=torch.int32))
    if batch.longest > layer.window:
        dim = k.shape[2]
        options = {"D": dim, "DP": triton.next_power_of_2(dim), "BLOCK": 64, "SCAN": SCAN}
        _pack_kept[(most_blocks(batch, len(k), 64), k.shape[1])](
            kept, (k, v, marks), (strides(k), strides(v)), batch.rows, batch.starts, len(batch.rows), layer.window,
            **options,
        )  # fmt: skip
    return kept


@triton.jit(do_not_specialize=["rows", "seen", "words", "window"])
def _index_ring(out, ring, rows, seen, words, window, BLOCK: tl.constexpr):
    head, sequence, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    row = tl.load(rows + sequence)
    if row < 0:
        return
    seen = tl.load(seen + row)
    pair = (sequence * heads + head).to(tl.int64)
    ring += (row * heads + head) * window
    count = 0
    for start in range(0, tl.minimum(seen + 1, window), BLOCK):
        age = start + tl.arange(0, BLOCK)
        held = (age < seen) & (age < window)
        entry = tl.load(ring + (seen - 1 - age) % window, mask=held, other=0)
        marked = entry & 1
        slot = entry >> 1
        below = count + tl.cumsum(marked) - marked
        tl.store(out.below + pair * window + age, below, mask=age < window)
        tl.store(out.slots + pair * window + below, slot, mask=marked != 0)
        tl.store(out.expiry + pair * window + below, window - 1 - age, mask=marked != 0)
        tl.atomic_or(out.bits + pair * words + slot // 32, 1 << (slot % 32), mask=marked != 0)
        count += tl.sum(marked)


@triton.jit(do_not_specialize=["rows", "starts", "sequences", "window"])
def _pack_kept(
    out, chunk, stride, rows, starts, sequences, window,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    k, v, marks = chunk
    head, heads = tl.program_id(1), tl.num_programs(1)
    sequence, first = block_of(starts, sequences, tl.program_id(0), BLOCK)
    if first < 0:
        return
    start = tl.load(starts + sequence).to(tl.int64)
    settled = tl.load(starts + sequence + 1) - start - window  # tokens from here on never leave a query's window
    if first > settled:
        return
    if tl.load(rows + sequence) < 0:
        return
    marks += start * heads + head
    before = 0
    for scanned in range(0, first, SCAN):
        token = scanned + tl.arange(0, SCAN)
        before += tl.sum((tl.load(marks + token * heads, mask=token < first, other=1) == 0).to(tl.int32))
    token = first + tl.arange(0, BLOCK)
    keep = (tl.load(marks + token * heads, mask=token < settled, other=1) == 0).to(tl.int32)
    rank = before + tl.cumsum(keep) - keep
    tl.store(out.before + (start + token) * heads + head, rank, mask=token <= settled)

    dim = tl.arange(0, DP)[None, :]
    moved = (keep != 0)[:, None] & (dim < D)
    target = ((start + rank) * heads + head)[:, None] * D + dim
    token = (start + token)[:, None]
    k += token * stride[0][0] + head.to(tl.int64) * stride[0][1] + dim
    v += token * stride[1][0] + head.to(tl.int64) * stride[1][1] + dim
    tl.store(out.k + target, tl.load(k, mask=moved), mask=moved)
    tl.store(out.v + target, tl.load(v, mask=moved), mask=moved)
