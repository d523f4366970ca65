"""prefill in plain PyTorch: a loop over (sequence, head, block of queries), each SDPA over what the block sees."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import Batch, LayerPages, ring_positions

NEVER = 2**31 - 1
BLOCK = 256


def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    marks: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See api.prefill."""
    heads = k.shape[1]
    out = torch.empty_like(q).unflatten(1, (heads, -1))
    lse = None
    if with_lse:
        work = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(out.shape[:3], -torch.inf, dtype=work, device=q.device)
    grouped = q.unflatten(1, (heads, -1))
    starts = batch.starts.tolist()
    lengths = layer.lengths[batch.rows].tolist()
    seen = layer.seen[batch.rows].tolist()
    for b, row in enumerate(batch.rows.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        if starts[b] == starts[b + 1]:
            continue
        if row < 0:
            out[tokens] = 0
            continue
        position = torch.arange(seen[b], seen[b] + starts[b + 1] - starts[b], device=q.device)
        for h, (stored_k, stored_v) in enumerate(gather_slots(layer, row, lengths[b])):
            keys = torch.cat([stored_k.to(k.dtype), k[tokens, h]])
            values = torch.cat([stored_v.to(v.dtype), v[tokens, h]])
            birth = torch.cat([position.new_full((lengths[b][h],), -1), position])
            expiry = torch.cat(
                [_stored_expiry(layer, row, h, lengths[b][h], seen[b]), torch.full_like(position, NEVER)]
            )
            if marks is not None:
                expiry[lengths[b][h] :].masked_scatter_(marks[tokens, h], position[marks[tokens, h]] + layer.window)
            out[tokens, h] = _head(
                grouped[tokens, h],
                keys,
                values,
                birth,
                expiry,
                position,
                scale,
                None if lse is None else lse[tokens, h],
            )
    return out.flatten(1, 2), None if lse is None else lse.flatten(1, 2)


def _stored_expiry(layer: LayerPages, row: int, head: int, length: int, seen: int) -> Tensor:
    """int64 [length]: the first position that no longer sees each stored slot."""
    expiry = torch.full((length,), NEVER, device=layer.kv.device)
    if layer.window:
        position = ring_positions(layer.seen[row : row + 1], layer.window)[0]
        ring = layer.ring[row, head]
        marked = (ring & 1).bool() & (position >= 0)
        expiry[(ring[marked] >> 1).long()] = position[marked].long() + layer.window
    return expiry


def _head(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    birth: Tensor,
    expiry: Tensor,
    position: Tensor,
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    """q: [S, G, D]; keys, values: [n, D]; birth, expiry: [n]; position: [S] -> [S, G, D]. lse: [S, G], written to."""
    outs = []
    for first, (block, at) in enumerate(zip(q.split(BLOCK), position.split(BLOCK), strict=True)):
        seen = ((expiry > at[0]) & (birth <= at[-1])).nonzero()[:, 0]
        mask = (birth[seen] <= at[:, None]) & (at[:, None] < expiry[seen])
        k, v = (x.index_select(0, seen).expand(block.shape[1], -1, -1) for x in (keys, values))
        out = scaled_dot_product_attention(block.transpose(0, 1)[None], k[None], v[None], mask[None, None], scale=scale)
        outs.append(out[0].transpose(0, 1))
        if lse is not None:
            scores = block.to(lse.dtype) @ keys[seen].to(lse.dtype).T * scale
            lse[first * BLOCK :][:BLOCK] = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)
    return torch.cat(outs)
