"""place in plain PyTorch: the oracle, and the CPU path."""

import torch
from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, PoolExhausted


def align_marks(layer: LayerPages, batch: Batch, decisions: Tensor, lag: int) -> Tensor:
    """Move decisions [T, H] to the tokens they decide: within the call by shifting, before it by setting ring marks.

    The last `lag` tokens of each sequence stay undecided (unmarked) until the next call. Never waits for the device.
    """
    total, heads = decisions.shape
    if total == 0:
        return decisions
    index = torch.arange(total, device=decisions.device)
    sequence = torch.repeat_interleave(batch.counts.long(), output_size=total)
    decided = index + lag < batch.starts[sequence + 1]
    aligned = decisions[(index + lag).clamp(max=total - 1)] & decided[:, None]

    rows, head = batch.rows[:, None], torch.arange(heads, device=decisions.device)
    for offset in range(lag):
        earlier = layer.seen[batch.rows] + offset - lag
        pending = (batch.counts > offset) & (earlier >= 0) & (batch.rows >= 0)
        entry = (earlier % layer.window).long()[:, None]
        old = layer.ring[rows, head, entry]
        new = old & ~1 | decisions[(batch.starts[:-1] + offset).clamp(max=total - 1)].int()
        # Added, not set: padded rows (-1) name the last row too, and must leave it as it is.
        layer.ring.index_put_((rows, head, entry), torch.where(pending[:, None], new - old, 0), accumulate=True)
    return aligned


def place_one(
    layer: LayerPages, rows: Tensor, k: Tensor, v: Tensor, marks: Tensor | None, slots: Tensor | None
) -> None:
    """One token for each of `rows`, none for -1: k, v [B, H, D]; marks [B, H]; slots [B, H] overrides the ring rule."""
    real = rows >= 0
    if not bool(real.all()):
        rows, k, v = rows[real], k[real], v[real]
        marks = None if marks is None else marks[real]
        slots = None if slots is None else slots[real]
    seen = layer.seen[rows]
    length = layer.lengths[rows]
    entry = (seen % max(layer.window, 1)).long()
    if slots is not None:
        slot = torch.where(slots >= 0, slots, length)
    elif layer.window:
        oldest = layer.ring[rows, :, entry]
        reuse = (oldest & 1).bool() & (seen >= layer.window)[:, None]
        slot = torch.where(reuse, oldest >> 1, length)
    else:
        slot = length
    new_length = torch.maximum(length, slot + 1)
    _extend(layer, rows, length, new_length)
    _write(layer, rows[:, None].expand_as(slot), _heads(slot), slot, k, v)
    if layer.window:
        mark = torch.zeros_like(slot) if marks is None else marks.int()
        layer.ring[rows, :, entry] = slot << 1 | mark
    layer.lengths[rows] = new_length
    layer.seen[rows] = seen + 1


def place_many(layer: LayerPages, batch: Batch, k: Tensor, v: Tensor, marks: Tensor | None) -> None:
    """Any number of tokens for each of `batch.rows`; the result is that of single steps."""
    rows, counts, window = batch.rows, batch.counts, layer.window
    step = torch.arange(batch.longest, device=k.device)
    valid = step < counts[:, None]  # [B, S]
    token = (batch.starts[:-1, None] + step).clamp(max=max(k.shape[0] - 1, 0))  # [B, S] into the packed call
    seen, length = layer.seen[rows], layer.lengths[rows]
    end = seen + counts
    position = seen[:, None] + step  # [B, S]

    in_window = position >= (end - window)[:, None]
    alive = valid[:, None].expand(-1, k.shape[1], -1)  # [B, H, S]
    mark = torch.zeros_like(alive)
    if marks is not None:
        mark = marks[token].transpose(1, 2)
        alive = alive & (~mark | in_window[:, None])
    rank = alive.int().cumsum(-1, dtype=torch.int32) - 1
    slot = length[..., None] + rank
    new_length = length + alive.sum(-1, dtype=torch.int32)
    if window:
        freed, slots = expired(layer, rows, seen, end)
        count = freed.sum(-1, dtype=torch.int32)[..., None]
        reused = slots.gather(-1, rank.clamp(0, window - 1).long())
        slot = torch.where(rank < count, reused, slot - count)
        new_length = new_length - count[..., 0]
    _extend(layer, rows, length, new_length)

    b, h, s = alive.nonzero(as_tuple=True)
    _write(layer, rows[b], h, slot[b, h, s], k[token[b, s], h], v[token[b, s], h])
    if window:
        b, h, s = (valid & in_window)[:, None].expand_as(alive).nonzero(as_tuple=True)
        entry = (position[b, s] % window).long()
        layer.ring[rows[b], h, entry] = slot[b, h, s] << 1 | mark[b, h, s].int()
    layer.lengths[rows] = new_length
    layer.seen[rows] = end


def ring_positions(seen: Tensor, window: int) -> Tensor:
    """The position that each ring entry speaks of, negative where it speaks of none: seen [B] -> int32 [B, W]."""
    entry = torch.arange(window, device=seen.device, dtype=torch.int32)
    last = seen[:, None] - 1
    return last - (last - entry) % window


def expired(layer: LayerPages, rows: Tensor, seen: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Stored tokens that no query from `end` - 1 on can see.

    seen, end: int32 [B]. Returns which ring entries, bool [B, H, W], and slots, int32 [B, H, W]: theirs first.
    """
    position = ring_positions(seen, layer.window)
    gone = (position >= 0) & (position < (end - layer.window)[:, None])
    ring = layer.ring[rows]
    freed = (ring & 1).bool() & gone[:, None]
    slots = torch.where(freed, ring >> 1, torch.iinfo(torch.int32).max).sort(-1).values
    return freed, slots


def _extend(layer: LayerPages, rows: Tensor, length: Tensor, new_length: Tensor) -> None:
    """Take pages off the free list so that each head has room for new_length [B, H] slots."""
    size = layer.page_size
    have = (length + size - 1) // size
    need = (new_length + size - 1) // size - have
    total = int(need.sum())
    if total == 0:
        return
    free = int(layer.free_count)
    if total > free:
        raise PoolExhausted(total, free)
    taken = layer.free[free - total : free]
    flat = need.flatten().long()
    head = torch.repeat_interleave(flat, output_size=total)
    within = torch.arange(total, device=flat.device) - (flat.cumsum(0) - flat)[head]
    column = have.flatten()[head] + within
    b, h = head // need.shape[1], head % need.shape[1]
    layer.pages[rows[b], h, column] = taken
    layer.free_count.sub_(total)


def _write(layer: LayerPages, rows: Tensor, heads: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k, v [..., D] into slot [...] of (rows [...], heads [...])."""
    page = layer.pages[rows, heads, slot // layer.page_size].long()
    offset = (slot % layer.page_size).long()
    layer.kv[page, :, offset] = torch.stack((k.detach(), v.detach()), dim=-2).to(layer.kv.dtype)


def _heads(slot: Tensor) -> Tensor:
    return torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
