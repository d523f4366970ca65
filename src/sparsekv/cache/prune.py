"""Keep some slots of each head and free the pages that are left over: on the device, for all rows and heads at once.

The kept slots move together in their order. Nothing here waits for the device: slots behind them are copied onto
themselves, and freed page ids are scattered onto the free stack.
"""

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache


def prune(cache: RaggedCache, index: int, rows: Tensor, keep: Tensor) -> None:
    """Keep only the slots of layer `index` in keep: bool [len(rows), H, W]; W: at least the longest head of the rows
    (int64, distinct). A ring follows its slots; a marked token that is dropped is forgotten there too.

    The rows own their pages alone: a policy that prunes declares that it rewrites.
    """
    assert cache.rewrites[index], "prune needs pages that are nobody else's: declare `rewrites`"
    width, device = keep.shape[-1], keep.device
    slot = torch.arange(width, device=device)
    length = cache.lengths[index][rows][..., None]
    keep = keep & (slot < length)
    left = keep.sum(-1, keepdim=True, dtype=torch.int32)
    rank = torch.where(keep, keep.cumsum(-1) - 1, width)  # the others go to a place of no use
    order = rank.new_zeros(*rank.shape[:-1], width + 1).scatter_(-1, rank, slot.expand_as(rank))[..., :width]
    source = torch.where(slot < left, order, slot)
    live = slot < length
    source, target = (torch.where(live, x, 0) for x in (source, slot.expand_as(source)))
    source[..., :1] = torch.where(left > 0, order[..., :1], 0)
    source = torch.where(live, source, source[..., :1])  # beyond the head: once more what goes to slot 0
    _move(cache, index, rows, source, target)
    _fill_behind(cache, index, rows, live & (slot >= left))
    if cache.rings[index].shape[-1]:
        _renumber(cache.rings[index], rows, keep)
    _free_pages(cache, index, rows, length, left)
    cache.lengths[index, rows] = left[..., 0]


def _places(cache: RaggedCache, index: int, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """(page, offset) of slots int64 [B, H, n]."""
    size = cache.pool.page_size
    table = cache.pages[index][rows].long()
    return table.gather(-1, slots // size), slots % size


def _move(cache: RaggedCache, index: int, rows: Tensor, source: Tensor, target: Tensor) -> None:
    pool = cache.pool
    (page, offset), (to, at) = (_places(cache, index, rows, slots) for slots in (source, target))
    pool.kv[to, :, at] = pool.kv[page, :, offset]
    for tensor in pool.slot_state.values():
        tensor[to, at] = tensor[page, offset]


def _fill_behind(cache: RaggedCache, index: int, rows: Tensor, gone: Tensor) -> None:
    """The state of slots in gone, bool [B, H, W], is that of free ones again."""
    pool = cache.pool
    slots = torch.arange(gone.shape[-1], device=gone.device).expand_as(gone)
    page, offset = _places(cache, index, rows, torch.where(gone, slots, 0))
    page = torch.where(gone, page, pool.pages)
    for name, tensor in pool.slot_state.items():
        tensor[page, offset] = pool.states[name].fill


def _renumber(ring: Tensor, rows: Tensor, keep: Tensor) -> None:
    entries = ring[rows]
    slots = (entries >> 1).long().clamp(max=keep.shape[-1] - 1)
    there = keep.gather(-1, slots)
    new = (keep.cumsum(-1, dtype=torch.int32) - 1).clamp(min=0).gather(-1, slots)
    ring[rows] = torch.where(there, new << 1 | entries & 1, 0)


def _free_pages(cache: RaggedCache, index: int, rows: Tensor, length: Tensor, left: Tensor) -> None:
    pool, size = cache.pool, cache.pool.page_size
    column = torch.arange(cache.pages.shape[-1], device=left.device)
    freed = (column >= -(-left // size)) & (column < -(-length // size))
    ids = cache.pages[index][rows]
    rank = freed.flatten().cumsum(0) - 1
    where = torch.where(freed.flatten(), pool.free_count + rank, pool.pages)
    pool.free[where] = ids.flatten()
    pool.clear_state(torch.where(freed, ids, pool.pages).flatten().long())
    pool.free_count += freed.sum(dtype=torch.int32)
