"""decode in plain PyTorch: a loop over (sequence, head), each an exact softmax over its live slots."""

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages


def gather_slots(layer: LayerPages, row: int, head: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head in slot order: two [length, D]."""
    table = layer.pages[row, head, : -(-length // layer.page_size)]
    keys, values = (layer.kv[:, i].index_select(0, table).flatten(0, 1) for i in (0, 1))  # one copy each
    return keys[:length], values[:length]


def decode(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    scale: float,
    with_weights: bool,
    longest: int | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See api.decode. Without `with_lse` the log-sum-exp is left out of the work, and is -inf."""
    heads = layer.lengths.shape[1]
    group = q.shape[1] // heads
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (heads, group)).to(work) * scale
    lengths = layer.lengths[rows].tolist()
    out = torch.zeros_like(grouped)
    lse = grouped.new_full(grouped.shape[:3], -torch.inf)
    longest = longest or max((n for row in lengths for n in row), default=0)
    weights = grouped.new_zeros(*grouped.shape[:3], longest) if with_weights else None
    for b, row in enumerate(rows.tolist()):
        for h, length in enumerate(lengths[b]):
            if row < 0 or length == 0:
                continue
            k, v = gather_slots(layer, row, h, length)
            scores = grouped[b, h] @ k.to(work).T
            weight = scores.softmax(-1)
            if with_lse:
                lse[b, h] = scores.amax(-1) - weight.amax(-1).log()  # the largest weight is exp(largest score - lse)
            out[b, h] = weight @ v.to(work)
            if weights is not None:
                weights[b, h, :, :length] = weight[:, :longest]
    shape = q.shape[:2]
    return out.reshape(q.shape).to(q.dtype), lse.reshape(shape), None if weights is None else weights.flatten(1, 2)
