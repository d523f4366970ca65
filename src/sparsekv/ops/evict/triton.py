"""evict in Triton: one kernel a call, a program per (sequence, head) that looks through the head's slots in tiles.

`_at_random` does so twice: it counts the candidates, then finds the one that was drawn. `_least_shared`, a program per
sequence, adds the heads up in order. `_when_full` and `_record` do little, for many heads a program.
"""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.launch import dependent, follow, take_turn
from sparsekv.ops.layout import LayerPages
from sparsekv.ops.noise_triton import mix, unit

TILE = 4096
"""Slots that a program looks at together, at most."""
HEADS = 128
"""Heads of a program that does little."""
FREE = ["pages", "lengths", "rows", "seen", "columns", "budget"]
"""Arguments of every kernel here that must not be specialised."""


def least_important(
    layer: LayerPages, rows: Tensor, weight: Tensor, born: Tensor, seen: Tensor, safe: int, budget: int
) -> Tensor:
    """See api.least_important."""
    victims, grid = _victims(layer, rows)
    if victims.numel():
        _least_important[grid](
            victims, weight, born, *_tables(layer), rows, seen, safe, layer.pages.shape[-1], budget,
            **_paged(layer), **_tiles(budget), **dependent(rows.device),
        )  # fmt: skip
    return victims


def at_random(
    layer: LayerPages,
    rows: Tensor,
    born: Tensor,
    prompt: Tensor,
    prompt_tokens: Tensor,
    *,
    seen: Tensor,
    samples: Tensor,
    seed: int,
    layer_index: int,
    recent: int,
    budget: int,
) -> Tensor:
    """See api.at_random."""
    victims, grid = _victims(layer, rows)
    if victims.numel():
        _at_random[grid](
            victims, born, prompt.view(torch.uint8), prompt_tokens, samples, *_tables(layer), rows, seen,
            seed, layer_index, recent, layer.pages.shape[-1], budget,
            **_paged(layer), **_tiles(budget), **dependent(rows.device),
        )  # fmt: skip
    return victims


def least_shared(layer: LayerPages, rows: Tensor, weights: Tensor, victim: Tensor) -> None:
    """See api.least_shared."""
    if len(rows):
        _least_shared[(len(rows),)](
            victim, weights.contiguous(), layer.lengths.contiguous(), rows, weights.shape[-1],
            **_shape(layer), **_tiles(weights.shape[-1]), **dependent(rows.device),
        )  # fmt: skip


def when_full(layer: LayerPages, rows: Tensor, victim: Tensor, budget: int) -> Tensor:
    """See api.when_full."""
    victims, _ = _victims(layer, rows)
    if count := victims.numel():
        _when_full[(triton.cdiv(count, HEADS),)](
            victims, victim, layer.lengths.contiguous(), rows, budget, count,
            **_shape(layer), HEADS=HEADS, num_warps=1, **dependent(rows.device),
        )  # fmt: skip
    return victims


def record(
    layer: LayerPages,
    rows: Tensor,
    slots: Tensor,
    born: Tensor,
    seen: Tensor,
    weight: Tensor | None,
    prompt: Tensor | None,
) -> None:
    """See api.record."""
    if count := slots.numel():
        _record[(triton.cdiv(count, HEADS),)](
            slots.contiguous(), born, born if weight is None else weight,
            born if prompt is None else prompt.view(torch.uint8),
            *_tables(layer), rows, seen, layer.pages.shape[-1], count,
            **_paged(layer), WEIGHT=weight is not None, PROMPT=prompt is not None, HEADS=HEADS,
            num_warps=1, **dependent(rows.device),
        )  # fmt: skip


def _victims(layer: LayerPages, rows: Tensor) -> tuple[Tensor, tuple[int]]:
    """int32 [B, H], to be written by one program each."""
    victims = torch.empty(len(rows), layer.lengths.shape[1], dtype=torch.int32, device=rows.device)
    return victims, (victims.numel(),)


def _tables(layer: LayerPages) -> tuple[Tensor, Tensor]:
    return layer.pages.contiguous(), layer.lengths.contiguous()


def _shape(layer: LayerPages) -> dict[str, Any]:
    return {"H": layer.lengths.shape[1], "FOLLOW": follow(layer.lengths.device)}


def _paged(layer: LayerPages) -> dict[str, Any]:
    return {**_shape(layer), "C": layer.page_size}


def _tiles(slots: int) -> dict[str, Any]:
    tile = min(triton.next_power_of_2(max(slots, 1)), TILE)
    return {"TILE": tile, "num_warps": min(max(tile // 256, 1), 16)}


@triton.jit
def _head(lengths, rows, head, H: tl.constexpr):
    """The sequence, the row (-1: padded), the (row, head) and the length (-1: padded) of head 0 .. B * H - 1."""
    sequence = head // H
    row = tl.load(rows + sequence).to(tl.int64)
    pair = row * H + head % H
    return sequence, row, pair, tl.load(lengths + pair, mask=row >= 0, other=-1)


@triton.jit
def _places(table, slot, live, C: tl.constexpr):
    """int64: where slots lie among all slots of the pool."""
    return tl.load(table + slot // C, mask=live, other=0).to(tl.int64) * C + slot % C


@triton.jit
def _first_least(best, at, last):
    """Of candidates [TILE] of one slot each, the first that is least; `last` if all are beyond it."""
    return tl.min(tl.where(best == tl.min(best, 0), at, last), 0)


@triton.jit(do_not_specialize=[*FREE, "safe"])
def _least_important(
    victims, weight, born, pages, lengths, rows, seen, safe, columns, budget,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    if FOLLOW:
        take_turn()
    sequence, _, pair, length = _head(lengths, rows, head, H)
    if length < budget:
        tl.store(victims + head, -1)
        return
    latest = tl.load(seen + sequence) - safe
    at = tl.arange(0, TILE)
    best = tl.full([TILE], float("inf"), weight.dtype.element_ty)
    for base in range(0, budget, TILE):
        slot = base + tl.arange(0, TILE)
        live = slot < budget
        place = _places(pages + pair * columns, slot, live, C)
        here = tl.load(weight + place, mask=live, other=float("inf"))
        here = tl.where(tl.load(born + place, mask=live, other=0) <= latest, here, float("inf"))
        at = tl.where(here < best, slot, at)
        best = tl.minimum(best, here)
    tl.store(victims + head, _first_least(best, at, budget))


@triton.jit
def _candidates(
    born, prompt, table, base, latest, fits, budget, C: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The slots from `base` on, and int32 whether they may be drawn."""
    slot = base + tl.arange(0, TILE)
    live = slot < budget
    place = _places(table, slot, live, C)
    old = tl.load(born + place, mask=live, other=0) <= latest
    held = (tl.load(prompt + place, mask=live, other=0) != 0) & fits
    return slot, (live & old & ~held).to(tl.int32)


@triton.jit(do_not_specialize=[*FREE, "samples", "seed", "layer_index", "recent"])
def _at_random(
    victims, born, prompt, prompt_tokens, samples, pages, lengths, rows, seen, seed, layer_index, recent, columns,
    budget, H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    if FOLLOW:
        take_turn()
    sequence, row, pair, length = _head(lengths, rows, head, H)
    if length < budget:
        tl.store(victims + head, -1)
        return
    position = tl.load(seen + sequence)
    fits = tl.load(prompt_tokens + row) + recent <= budget
    table, latest = pages + pair * columns, position - recent
    count = 0
    for base in range(0, budget, TILE):
        _, candidate = _candidates(born, prompt, table, base, latest, fits, budget, C, TILE)
        count += tl.sum(candidate)
    z = mix(mix(seed.to(tl.int64)) + tl.load(samples + row))
    z = mix(mix(mix(z + layer_index) + head % H) + position)
    chosen = (unit(z) * count.to(tl.float64)).to(tl.int32)
    before, victim = 0, 0  # candidates and slots in front of the chosen-th
    for base in range(0, budget, TILE):
        slot, candidate = _candidates(born, prompt, table, base, latest, fits, budget, C, TILE)
        order = before + tl.cumsum(candidate, 0)
        victim += tl.sum(((order <= chosen) & (slot < budget)).to(tl.int32))
        before += tl.sum(candidate)
    tl.store(victims + head, tl.minimum(victim, budget - 1))


@triton.jit(do_not_specialize=["victim", "weights", "lengths", "rows", "width"])
def _least_shared(
    victim, weights, lengths, rows, width, H: tl.constexpr, TILE: tl.constexpr, FOLLOW: tl.constexpr
):  # fmt: skip
    if FOLLOW:
        take_turn()
    sequence, row, _, length = _head(lengths, rows, tl.program_id(0) * H, H)
    if row < 0:
        return
    weights += sequence.to(tl.int64) * H * width
    at = tl.arange(0, TILE)
    best = tl.full([TILE], float("inf"), weights.dtype.element_ty)
    end = tl.minimum(length, width)
    for base in range(0, end, TILE):
        slot = base + tl.arange(0, TILE)
        total = tl.load(weights + slot, mask=slot < end, other=float("inf"))
        for head in tl.static_range(1, H):
            total += tl.load(weights + head * width + slot, mask=slot < end, other=0.0)
        at = tl.where(total < best, slot, at)
        best = tl.minimum(best, total)
    tl.store(victim + row, _first_least(best, at, width).to(tl.int64))


@triton.jit(do_not_specialize=["victim", "lengths", "rows", "budget", "count"])
def _when_full(
    victims, victim, lengths, rows, budget, count, H: tl.constexpr, HEADS: tl.constexpr, FOLLOW: tl.constexpr
):  # fmt: skip
    if FOLLOW:
        take_turn()
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = tl.load(rows + head // H, mask=head < count, other=-1).to(tl.int64)
    length = tl.load(lengths + row * H + head % H, mask=row >= 0, other=-1)
    chosen = tl.load(victim + row, mask=row >= 0, other=-1).to(tl.int32)
    tl.store(victims + head, tl.where(length >= budget, chosen, -1), mask=head < count)


@triton.jit(do_not_specialize=["slots", *FREE[:-1], "count"])
def _record(
    slots, born, weight, prompt, pages, lengths, rows, seen, columns, count,
    H: tl.constexpr, C: tl.constexpr, WEIGHT: tl.constexpr, PROMPT: tl.constexpr, HEADS: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    if FOLLOW:
        take_turn()
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = tl.load(rows + head // H, mask=head < count, other=-1).to(tl.int64)
    pair = row * H + head % H
    slot = tl.load(slots + head, mask=row >= 0, other=-1)
    slot = tl.where(slot >= 0, slot, tl.load(lengths + pair, mask=row >= 0, other=0) - 1)
    some = (row >= 0) & (slot >= 0) & (slot // C < columns)
    place = _places(pages + pair * columns, slot, some, C)
    tl.store(born + place, tl.load(seen + head // H, mask=some, other=0), mask=some)
    if WEIGHT:
        tl.store(weight + place, tl.zeros([HEADS], weight.dtype.element_ty), mask=some)
    if PROMPT:
        tl.store(prompt + place, tl.zeros([HEADS], tl.uint8), mask=some)
