"""decode in plain PyTorch: a loop over (sequence, head), each an exact softmax over its live slots."""

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages


def gather_slots(layer: LayerPages, row: int, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each head of a row in slot order, two [length, D] a head: one copy of whole pages each."""
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
    with_weights: bool,
    longest: int | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See api.decode. A head that holds nothing sums over nothing: its output is 0 and its log-sum-exp -inf."""
    heads = layer.lengths.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(work) * scale).unflatten(1, (heads, -1))
    lengths = layer.lengths.tolist()
    held = [lengths[row] if row >= 0 else [0] * heads for row in rows.tolist()]
    longest = longest or max((n for row in held for n in row), default=0)
    out, lse = [], []
    weights = grouped.new_zeros(*grouped.shape[:3], longest) if with_weights else None
    for b, row in enumerate(rows.tolist()):
        for h, (query, (k, v)) in enumerate(zip(grouped[b], gather_slots(layer, row, held[b]), strict=True)):
            scores = query @ k.to(work).T
            weight = scores.softmax(-1)
            out.append(weight @ v.to(work))
            if with_lse:
                # The largest weight is exp(largest score - lse).
                empty = scores.new_full(scores.shape[:1], -torch.inf)
                lse.append(scores.amax(-1) - weight.amax(-1).log() if len(k) else empty)
            if weights is not None:
                weights[b, h, :, : held[b][h]] = weight[:, :longest]
    return (
        torch.cat(out).view(q.shape).to(q.dtype),
        torch.cat(lse).view(q.shape[:2]) if with_lse else None,
        None if weights is None else weights.flatten(1, 2),
    )
