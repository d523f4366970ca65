"""weigh in plain PyTorch: a loop over (sequence, head, block of queries), each a masked square of weights."""

import torch
from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, held_slots

BLOCK = 256


def weigh(
    layer: LayerPages, batch: Batch, q: Tensor, scale: float, longest: int, lse: Tensor | None, into: Tensor | None
) -> Tensor:
    """See api.weigh."""
    heads = layer.lengths.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (heads, -1))
    norm = None if lse is None else lse.unflatten(1, (heads, -1))
    sums = torch.zeros(len(batch.rows), heads, longest, dtype=work, device=q.device)
    starts = batch.starts.tolist()
    for b, row in enumerate(batch.rows.tolist()):
        if row < 0:
            continue
        tokens = slice(starts[b], starts[b + 1])
        for h, length in enumerate(layer.lengths[row].tolist()):
            table = layer.pages[row, h, : -(-length // layer.page_size)]
            keys = layer.kv[:, 0].index_select(0, table).flatten(0, 1)[:length].to(work)
            column = _columns(grouped[tokens, h].to(work) * scale, keys, None if norm is None else norm[tokens, h])
            sums[b, h, :length] = column[:longest]
    if into is None:
        return sums
    at, live = held_slots(layer, batch.rows, longest)
    into.view(-1)[at[live]] += sums[..., : at.shape[-1]][live]
    return into


def _columns(q: Tensor, keys: Tensor, lse: Tensor | None) -> Tensor:
    """q: [n, G, D], scaled; keys: [L, D], the last n of them the queries' own; lse: [n, G] -> [L]."""
    slot = torch.arange(len(keys), device=q.device)
    newest = torch.arange(len(keys) - len(q), len(keys), device=q.device)  # negative: sees nothing
    total = keys.new_zeros(len(keys))
    for first in range(0, len(q), BLOCK):
        block = slice(first, first + BLOCK)
        seen = slot <= newest[block, None, None]
        scores = (q[block] @ keys.T).masked_fill(~seen, -torch.inf)
        norm = scores.logsumexp(-1) if lse is None else lse[block]
        total += (scores - norm[..., None]).exp().where(seen, 0).sum((0, 1))
    return total
