"""bounds in plain PyTorch: the oracle, and the CPU path."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekv.ops.layout import LayerPages
from sparsekv.ops.layout import written as last_written


def refresh(layer: LayerPages, rows: Tensor, bounds: Tensor, longest: int) -> None:
    """See api.refresh."""
    rows = rows[rows >= 0]
    column = torch.arange(_width(layer, longest), device=rows.device)
    live = layer.lengths[rows][..., None] - column * layer.page_size  # [B, H, N]
    _write(layer, layer.pages[rows, :, : len(column)][live > 0], live[live > 0], bounds)


def refresh_written(layer: LayerPages, rows: Tensor, slots: Tensor | None, bounds: Tensor) -> None:
    """See api.refresh_written."""
    if slots is None:
        slots = last_written(layer, rows, None)
    column = slots // layer.page_size
    live = layer.lengths[rows] - column * layer.page_size  # [B, H]
    b, h = ((rows >= 0)[:, None] & (slots >= 0) & (live > 0)).nonzero(as_tuple=True)
    _write(layer, layer.pages[rows[b], h, column[b, h].long()], live[b, h], bounds)


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
    if written is None:
        written = last_written(layer, rows, None)
    size, real = layer.page_size, rows >= 0
    table = layer.pages[rows, :, : _width(layer, longest)]  # [B, H, N]
    length = torch.where(real[:, None], layer.lengths[rows], 0)[..., None]  # [B, H, 1]
    column = torch.arange(table.shape[-1], dtype=torch.int32, device=rows.device)
    held = column * size < length
    score = _bounds_of(q, bounds[torch.where(held, table, len(bounds) - 1)])
    score = torch.where(held, score, -torch.inf)
    score = torch.where((written[..., None] >= 0) & (column == written[..., None] // size), torch.inf, score)
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    best = order[..., :count].sort(-1).values
    tokens = (length - best.int() * size).clamp(0, size).sum(-1, dtype=torch.int32)
    if reads is not None:
        reads[0, rows[real]] += tokens[real]
        reads[1, rows[real]] += held.sum(-1)[real]
    pages = pad(table.gather(-1, best), (0, count - best.shape[-1]))
    return pages, tokens, torch.where(real, layer.seen[rows], 0)


def _width(layer: LayerPages, longest: int) -> int:
    """Page-table columns that `longest` slots take."""
    return min(-(-longest // layer.page_size), layer.pages.shape[-1])


def _write(layer: LayerPages, pages: Tensor, live: Tensor, bounds: Tensor) -> None:
    """Bounds of pages [n] over their first `live` [n] slots."""
    keys = layer.kv[pages, 0]  # [n, C, D]
    unused = (torch.arange(layer.page_size, device=pages.device) >= live[:, None])[..., None]
    low, high = keys.masked_fill(unused, torch.inf).amin(1), keys.masked_fill(unused, -torch.inf).amax(1)
    bounds[pages] = torch.stack([low, high], 1)


def _bounds_of(q: Tensor, bounds: Tensor) -> Tensor:
    """q [B, H * G, D], bounds [B, H, N, 2, D] -> [B, H, N]; max(q low, q high) is q high where q > 0, else q low."""
    work = torch.promote_types(torch.promote_types(q.dtype, bounds.dtype), torch.float32)
    query = q.to(work).unflatten(1, (bounds.shape[1], -1))  # [B, H, G, D]
    low, high = bounds.to(work).unbind(-2)
    return (query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT).amax(2)
