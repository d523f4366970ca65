"""decode in plain PyTorch: an exact softmax over the live slots of each head.

All pages of all rows are copied together and multiplied page by page, and each head's are added up, so that a layer
takes few calls however many rows there are.
"""

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages


def gather_slots(layer: LayerPages, row: int, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each head of a row in slot order: two [length, D] a head."""
    counts = [-(-length // layer.page_size) for length in lengths]
    table = torch.cat([layer.pages[row, head, :count] for head, count in enumerate(counts)])
    keys, values = (layer.kv[:, i].index_select(0, table).split(counts) for i in (0, 1))
    return [
        (k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]) for k, v, length in zip(keys, values, lengths, strict=True)
    ]


def decode(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    scale: float,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See api.decode. A head that holds nothing sums over nothing: its output is 0 and its log-sum-exp -inf."""
    heads, size = layer.lengths.shape[1], layer.page_size
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(work) * scale).contiguous().view(len(rows) * heads, -1, q.shape[-1])  # [B * H, G, D]
    held = layer.lengths[rows.long()].masked_fill(rows[:, None] < 0, 0).flatten()
    owner, number, table = _pages_of(layer, rows, held)
    keys, values = layer.kv.index_select(0, table).to(work).unbind(1)  # [N, C, D] each
    unused = number[:, None] * size + torch.arange(size, device=q.device) >= held[owner, None]  # [N, C]
    partly = unused.any(1).nonzero()[:, 0]
    values[partly] = values[partly].masked_fill(unused[partly, :, None], 0)  # anything may lie there
    scores = torch.bmm(grouped[owner], keys.mT).masked_fill(unused[:, None], -torch.inf)  # [N, G, C]
    to = owner[:, None].expand(-1, grouped.shape[1])
    nothing = grouped.new_full(grouped.shape[:2], -torch.inf)
    most = nothing.scatter_reduce(0, to, scores.amax(-1), "amax")
    weight = (scores - most[owner, :, None]).exp()
    total = torch.zeros_like(most).index_add(0, owner, weight.sum(-1))
    out = torch.zeros_like(grouped).index_add(0, owner, torch.bmm(weight, values))
    out = out / total.masked_fill(total == 0, 1)[..., None]
    lse = (most + total.log()).view(q.shape[:2]) if with_lse else None
    return out.view(q.shape).to(q.dtype), lse


def _pages_of(layer: LayerPages, rows: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N pages in use by rows: int64 [N] which of the B * H heads each belongs to, int64 [N] its number
    within that head, and int32 [N] its place in the pool. held: int32 [B * H]."""
    counts = (held + layer.page_size - 1) // layer.page_size
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    number = torch.arange(len(owner), device=owner.device) - first[owner]
    row, head = rows.long()[owner // layer.lengths.shape[1]], owner % layer.lengths.shape[1]
    return owner, number, layer.pages[row, head, number]
