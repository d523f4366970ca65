"""The tensors that every operation works on.

Legend   B sequences in a call, T tokens in a call (all sequences packed), R rows of the cache, H KV heads, G query
         heads per KV head, D head dimension, P pages of the pool, C slots per page, M page-table columns, W ring
         entries.

A slot is an index 0 .. length - 1 within one (row, head); it lies in page `pages[row, head, slot // C]` at place
`slot % C`. A key is stored after RoPE at its own position, so the order of slots never matters.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor


class PoolExhausted(ValueError):
    """The pool has fewer free pages than an operation needs. Nothing was written."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} pages are needed and {free} are free")
        self.needed = needed
        self.free = free


@dataclass(frozen=True, kw_only=True)
class LayerPages:
    """One layer of the cache: views, so that writing to them writes to the cache."""

    kv: Tensor
    """[P, 2, C, D]: keys at index 0 and values at index 1 of each page."""
    pages: Tensor
    """int32 [R, H, M]: page table."""
    lengths: Tensor
    """int32 [R, H]: slots in use."""
    ring: Tensor
    """int32 [R, H, W]: entry t % W holds `slot << 1 | mark` of token t, for the last W tokens. W = the window; W = 0
    where nothing is ever overwritten."""
    seen: Tensor
    """int32 [R]: tokens seen."""
    free: Tensor
    """int32 [P]: a stack of free page ids, of which the first `free_count` are valid."""
    free_count: Tensor
    """int32 [1]. Negative after kernels ran out of pages: tokens are missing then."""
    tickets: Tensor | None = None
    """int32 [R, H], zero between calls: the decode kernel counts finished pieces of a head there. None: each call
    clears its own, which costs a launch."""

    @property
    def page_size(self) -> int:
        return self.kv.shape[2]

    @property
    def window(self) -> int:
        return self.ring.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Which rows a packed call is about: tokens `starts[i] .. starts[i + 1] - 1` belong to row `rows[i]`."""

    rows: Tensor
    """int64 [B], distinct; -1 for the padded places of a CUDA graph: nothing is done there."""
    starts: Tensor
    """int32 [B + 1]."""
    longest: int
    """At least the largest number of tokens of one sequence; 1 = a decode step (then T = B)."""

    @property
    def counts(self) -> Tensor:
        """int32 [B]: tokens per sequence."""
        return self.starts[1:] - self.starts[:-1]

    def positions(self, seen: Tensor, *, total: int) -> Tensor:
        """int32 [total]: each token's position in its own sequence; seen: int32 [B]; total: T."""
        first = torch.repeat_interleave(seen - self.starts[:-1], self.counts, output_size=total)
        return first + torch.arange(total, device=seen.device, dtype=torch.int32)


def batch_of(rows: Tensor, counts: list[int]) -> Batch:
    """The Batch in which row `rows[i]` has `counts[i]` tokens (0 is allowed)."""
    starts = torch.tensor([0, *counts], device=rows.device).cumsum(0).to(torch.int32)
    longest = max(counts, default=0)
    if longest == 1 and 0 in counts:
        longest = 2  # not a decode step, which has exactly one token a row
    return Batch(rows=rows, starts=starts, longest=longest)


@dataclass(frozen=True, kw_only=True)
class LinearMarks:
    """Marks that `place` computes itself, for decisions of each token about itself (lag 0).

    Token t of head h is marked where weight[h] . hidden[t] + bias[h] + offset > 0, in float32 whatever the inputs are.
    """

    hidden: Tensor
    """[T, E]."""
    weight: Tensor
    """[H, E]."""
    bias: Tensor
    """[H]."""
    offset: Tensor
    """float32 [1], on the device, so that it can change without a new CUDA graph."""

    def marks(self) -> Tensor:
        """bool [T, H]."""
        return torch.nn.functional.linear(self.hidden.float(), self.weight.float(), self.bias.float()) + self.offset > 0


@dataclass(frozen=True, kw_only=True)
class LaterMarks:
    """Marks that `place` computes itself in a decode step: all tokens but the first of each sequence."""

    first: int
    """How many are not marked."""

    def marks(self, layer: LayerPages, rows: Tensor) -> Tensor:
        """bool [B, H], of the next token of each row."""
        return (layer.seen[rows] >= self.first)[:, None].expand(-1, layer.lengths.shape[1])


def ring_positions(seen: Tensor, window: int) -> Tensor:
    """The position that each ring entry speaks of, negative where it speaks of none: seen [..., B] -> int32
    [..., B, W]."""
    entry = torch.arange(window, device=seen.device, dtype=torch.int32)
    last = seen[..., None] - 1
    return last - (last - entry) % window


def held_slots(layer: LayerPages, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where the slots 0 .. width - 1 of each head of rows (int64 [B], -1 for none) lie among all slots of the pool,
    int64 [B, H, width], and which of them are in use, bool; the others are given the pool's spare place. No wider than
    the page tables."""
    size, spare = layer.page_size, layer.kv.shape[0] * layer.page_size
    width = min(width, layer.pages.shape[-1] * size)
    slot = torch.arange(width, device=rows.device)
    live = (slot < layer.lengths[rows][..., None]) & (rows >= 0)[:, None, None]
    table = layer.pages[rows, :, : -(-width // size)].long()
    at = (table[..., None] * size + torch.arange(size, device=rows.device)).flatten(-2)[..., :width]
    return torch.where(live, at, spare), live


def slot_places(layer: LayerPages, rows: Tensor, slots: Tensor) -> Tensor:
    """Where slots int64 [B, H] of rows lie among all slots of the pool; the spare place for a row of -1 or a slot that
    the page table has no room for."""
    size, head = layer.page_size, torch.arange(slots.shape[1], device=slots.device)
    column = slots // size
    real = (rows >= 0)[:, None] & (slots >= 0) & (column < layer.pages.shape[-1])
    page = layer.pages[rows[:, None], head, torch.where(real, column, 0)].long()
    return torch.where(real, page * size + slots % size, layer.kv.shape[0] * size)


def appended(layer: LayerPages, batch: Batch, total: int) -> Tensor:
    """int64 [T, H]: where the tokens of a prefill that was just placed lie, in a layer without a ring."""
    sequence = torch.repeat_interleave(batch.counts.long(), output_size=total)
    rows = batch.rows[sequence]
    behind = batch.starts[sequence + 1] - torch.arange(total, device=rows.device)
    return slot_places(layer, rows, layer.lengths[rows].long() - behind[:, None])


def written(layer: LayerPages, rows: Tensor, slots: Tensor | None) -> Tensor:
    """int64 [B, H]: the slot that the decode step just placed took; slots: what `place` was given. Rows of -1: any."""
    newest = layer.lengths[rows].long() - 1
    if slots is not None:
        return torch.where(slots >= 0, slots.long(), newest)
    if layer.window:
        entry = ((layer.seen[rows] - 1) % layer.window).long()
        return (
            layer.ring[rows].gather(-1, entry[:, None, None].expand(-1, layer.ring.shape[1], 1))[..., 0] >> 1
        ).long()
    return newest


def check_backend(backend: str | None, device: torch.device, known: tuple[str, ...]) -> str:
    """The backend to run: the one asked for by name, else Triton on CUDA where it exists, else the reference.

    Raises ValueError for an unknown name, and where Triton is asked for by name and cannot run: a backend asked for by
    name never falls back in silence.
    """
    if backend is None:
        return "triton" if device.type == "cuda" and "triton" in known and find_spec("triton") else "reference"
    if backend not in known:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(known)}")
    if backend == "triton":
        if not find_spec("triton"):
            raise ValueError("backend 'triton' needs the package triton: pip install triton, or use 'reference'")
        if device.type != "cuda" and not interpreting():
            raise ValueError(f"backend 'triton' needs tensors on a CUDA device, these are on {device}; use 'reference'")
    return backend


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    from triton import knobs

    return knobs.runtime.interpret
