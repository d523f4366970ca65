"""evict in plain PyTorch: the oracle, and the CPU path."""

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages, held_slots, slot_places, written
from sparsekv.ops.noise import uniform


def least_important(
    layer: LayerPages, rows: Tensor, weight: Tensor, born: Tensor, seen: Tensor, safe: int, budget: int
) -> Tensor:
    """See api.least_important."""
    at, live = held_slots(layer, rows, budget)
    old = born.view(-1)[at] <= seen[:, None, None] - safe
    importance = weight.view(-1)[at].masked_fill(~(live & old), torch.inf)
    return _where_full(layer, rows, importance.argmin(-1), budget)


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
    at, live = held_slots(layer, rows, budget)
    old = born.view(-1)[at] <= seen[:, None, None] - recent
    fits = (prompt_tokens[rows] + recent <= budget)[:, None, None]
    order = (live & old & ~(prompt.view(-1)[at] & fits)).cumsum(-1)
    seed_, layer_ = (torch.full((), key, device=rows.device) for key in (seed, layer_index))
    head = torch.arange(at.shape[1], device=rows.device)
    drawn = uniform(seed_, samples[rows][:, None], layer_, head, seen[:, None].long())
    chosen = (drawn * order[..., -1]).long()
    victims = (order <= chosen[..., None]).sum(-1).clamp(max=at.shape[-1] - 1)
    return _where_full(layer, rows, victims, budget)


def least_shared(layer: LayerPages, rows: Tensor, weights: Tensor, victim: Tensor) -> None:
    """See api.least_shared. Heads are added one after the other, so that the sum is the same everywhere."""
    total = sum(weights.unbind(1))
    assert isinstance(total, Tensor)
    live = torch.arange(total.shape[-1], device=rows.device) < layer.lengths[rows, :1]
    real = rows >= 0
    victim[rows[real]] = total.masked_fill(~live, torch.inf).argmin(-1)[real]


def when_full(layer: LayerPages, rows: Tensor, victim: Tensor, budget: int) -> Tensor:
    """See api.when_full."""
    return _where_full(layer, rows, victim[rows][:, None], budget)


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
    at = slot_places(layer, rows, written(layer, rows, slots))
    real = at < layer.kv.shape[0] * layer.page_size
    at, seen = at[real], seen[:, None].expand_as(real)[real]
    born.view(-1)[at] = seen
    for state in (weight, prompt):
        if state is not None:
            state.view(-1)[at] = torch.zeros_like(at, dtype=state.dtype)


def _where_full(layer: LayerPages, rows: Tensor, victims: Tensor, budget: int) -> Tensor:
    full = (layer.lengths[rows] >= budget) & (rows >= 0)[:, None]
    return torch.where(full, victims, -1).int()
