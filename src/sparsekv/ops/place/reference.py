"""place in plain PyTorch: the oracle, and the CPU path."""

import torch
from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, PoolExhausted, batch_of, ring_positions


def align_marks(layer: LayerPages, batch: Batch, decisions: Tensor, lag: int) -> Tensor:
    """Move decisions [T, H] to the tokens they decide: within the call by shifting, before it by setting ring marks.

    The last `lag` tokens of each sequence, at most the window, stay undecided (unmarked) until the next call. Never
    waits for the device.
    """
    total, heads = decisions.shape
    if total == 0:
        return decisions
    index = torch.arange(total, device=decisions.device)
    sequence = torch.repeat_interleave(batch.counts.long(), output_size=total)
    decided = index + lag < batch.starts[sequence + 1]
    aligned = decisions[(index + lag).clamp(max=total - 1)] & decided[:, None]

    # The first `lag` decisions of the call are about tokens in the ring.
    offset = torch.arange(lag, device=decisions.device)
    earlier = layer.seen[batch.rows][:, None] + offset - lag  # [B, lag]
    pending = (batch.counts[:, None] > offset) & (earlier >= 0) & (batch.rows >= 0)[:, None]
    entry = (earlier % layer.window).long()[..., None]
    rows, head = batch.rows[:, None, None], torch.arange(heads, device=decisions.device)
    old = layer.ring[rows, head, entry]  # [B, lag, H]
    source = (batch.starts[:-1, None] + offset).clamp(max=total - 1)
    new = old & ~1 | decisions[source].int()
    # Added, not set: padded rows (-1) name the last row too, and must leave it as it is.
    layer.ring.index_put_((rows, head, entry), torch.where(pending[..., None], new - old, 0), accumulate=True)
    return aligned


def place_one(
    layer: LayerPages, rows: Tensor, k: Tensor, v: Tensor, marks: Tensor | None, slots: Tensor | None
) -> None:
    """One token for each of `rows`, none for -1: k, v [B, H, D]; marks [B, H]; slots [B, H] overrides the ring rule.

    Slots are reckoned in Python's integers: they are so few that each tensor operation costs more than all of them.
    """
    where = rows.tolist()
    if min(where, default=0) < 0:
        real = rows >= 0
        marks, slots = (None if x is None else x[real] for x in (marks, slots))
        place_one(layer, rows[real], k[real], v[real], marks, slots)
        return
    window, device = layer.window, k.device
    lengths, seen = layer.lengths.tolist(), layer.seen.tolist()
    cells = [(row, head, seen[row] % max(window, 1)) for row in where for head in range(k.shape[1])]
    length = [lengths[row][head] for row, head, _ in cells]
    row, head, entry = torch.tensor(cells, dtype=torch.int64, device=device).view(-1, 3).unbind(-1)
    slot = length
    if slots is not None:
        slot = [s if s >= 0 else end for s, end in zip(slots.flatten().tolist(), length, strict=True)]
    elif window:
        full = [seen[cell[0]] >= window for cell in cells]
        oldest = layer.ring[row, head, entry].tolist()
        slot = [old >> 1 if old & 1 and f else end for old, f, end in zip(oldest, full, length, strict=True)]

    new_length = [max(s + 1, end) for s, end in zip(slot, length, strict=True)]
    if new_length != length:
        grown = torch.tensor(new_length, dtype=torch.int32, device=device).view(len(where), -1)
        if any(end % layer.page_size == 0 and new > end for new, end in zip(new_length, length, strict=True)):
            _extend(layer, rows, layer.lengths[rows], grown)
        layer.lengths[rows] = grown
    places = [divmod(s, layer.page_size) for s in slot]
    column, offset = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).unbind(-1)
    _write(layer, layer.pages[row, head, column], offset, k.flatten(0, 1), v.flatten(0, 1))
    if window:
        mark = [0] * len(slot) if marks is None else marks.flatten().tolist()
        written = [s << 1 | m for s, m in zip(slot, mark, strict=True)]
        layer.ring[row, head, entry] = torch.tensor(written, dtype=torch.int32, device=device)
    layer.seen.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))


def place_many(layer: LayerPages, batch: Batch, k: Tensor, v: Tensor, marks: Tensor | None) -> None:
    """Any number of tokens for each of `batch.rows`, none for -1; the result is that of single steps."""
    real = batch.rows >= 0
    if not real.all():
        token = torch.repeat_interleave(real, batch.counts)
        batch = batch_of(batch.rows[real], batch.counts[real].tolist())
        k, v, marks = k[token], v[token], None if marks is None else marks[token]
        if not len(batch.rows):
            return
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
    at = slot[b, h, s]
    pages = layer.pages[rows[b], h, at // layer.page_size]
    _write(layer, pages, at % layer.page_size, k[token[b, s], h], v[token[b, s], h])
    if window:
        b, h, s = (valid & in_window)[:, None].expand_as(alive).nonzero(as_tuple=True)
        entry = (position[b, s] % window).long()
        layer.ring[rows[b], h, entry] = slot[b, h, s] << 1 | mark[b, h, s].int()
    layer.lengths[rows] = new_length
    layer.seen[rows] = end


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


def _write(layer: LayerPages, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k, v [n, D] at offsets [n] within pages [n]."""
    flat, size = layer.kv.view(-1, layer.kv.shape[-1]), layer.page_size
    at = torch.add(offsets.long(), pages.long(), alpha=2 * size)
    flat.index_copy_(0, at, k.detach().to(flat.dtype))
    flat.index_copy_(0, at + size, v.detach().to(flat.dtype))
