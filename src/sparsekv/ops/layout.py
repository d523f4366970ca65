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
    """int64 [B], distinct; -1 for the padded places of a CUDA graph, in a decode step only: nothing is done there."""
    starts: Tensor
    """int32 [B + 1]."""
    longest: int
    """At least the largest number of tokens of one sequence; 1 = a decode step (then T = B)."""

    @property
    def counts(self) -> Tensor:
        """int32 [B]: tokens per sequence."""
        return self.starts[1:] - self.starts[:-1]

    def positions(self, seen: Tensor) -> Tensor:
        """int32 [T]: each token's position in its own sequence; seen: int32 [B]."""
        total = int(self.starts[-1]) if self.longest > 1 else len(seen)
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


def ring_positions(seen: Tensor, window: int) -> Tensor:
    """The position that each ring entry speaks of, negative where it speaks of none: seen [B] -> int32 [B, W]."""
    entry = torch.arange(window, device=seen.device, dtype=torch.int32)
    last = seen[:, None] - 1
    return last - (last - entry) % window


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
