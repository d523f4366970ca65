"""Move a row of the ragged cache to host memory and back, bit for bit, compressed as it is.

What leaves is what the row owns: its pages (whole, so that every slot keeps its place), lengths, tokens seen, rings and
what policies remember. Pages shared with other rows stay with those. The way out waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.transfer import upload

CHUNK = 4096
"""Pages moved at once, so that a full device needs little room for the copy."""


@dataclass(frozen=True, kw_only=True)
class SwappedRow:
    """One row in host memory; never written to, so that several rows may be swapped in from it."""

    kv: Tensor
    """[pages, 2, C, D], in the order of layers, heads and page-table columns."""
    lengths: Tensor
    """int32 [N, H]."""
    seen: Tensor
    """int32 [N]."""
    rings: list[Tensor]
    """Per ring_blocks of the cache, int32 [n, H, W]."""
    pool_state: dict[str, Tensor]
    """What policies remember of those pages and their slots: [pages, ...]."""
    row_state: list[dict[str, Tensor]]
    """Per layer, what its policy remembers of the row."""

    @property
    def pages(self) -> int:
        return self.kv.shape[0]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.kv, *self.pool_state.values()))


def swap_out(cache: RaggedCache, row: int) -> SwappedRow:
    """Copy a row to host memory. The row stays as it is: release it to free its pages."""
    rows = torch.tensor([row], device=cache.lengths.device)
    ids = cache.pages[:, rows][cache.owned(rows)].long()
    host = _empty((len(ids), *cache.pool.kv.shape[1:]), cache.pool.kv)
    for part, into in zip(ids.split(CHUNK), host.split(CHUNK), strict=True):
        into.copy_(cache.pool.kv[part])
    return SwappedRow(
        kv=host,
        lengths=_host(cache.lengths[:, row]),
        seen=_host(cache.seen[:, row]),
        rings=[_host(block.rings[:, row]) for block in cache.ring_blocks],
        pool_state={name: _host(tensor[ids]) for name, tensor in cache.pool.state.items()},
        row_state=[{name: _host(tensor[row]) for name, tensor in state.items()} for state in cache.row_state],
    )


def swap_in(cache: RaggedCache, row: int, swapped: SwappedRow) -> None:
    """Fill an empty row from host memory, without waiting for the device. The pool must have swapped.pages free ones:
    whoever asks keeps the account."""
    device, size = cache.lengths.device, cache.pool.page_size

    def sent(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    ids = cache.pool.take_surely(swapped.pages)
    for part, source in zip(ids.split(CHUNK), swapped.kv.split(CHUNK), strict=True):
        cache.pool.kv[part] = sent(source)
    cache.lengths[:, row] = sent(swapped.lengths)
    cache.seen[:, row] = sent(swapped.seen)
    owned = torch.arange(cache.pages.shape[-1]) < -(-swapped.lengths // size)[..., None]
    places = upload(owned.flatten().nonzero()[:, 0], torch.int64, device)
    table = cache.pages[:, row].flatten()
    cache.pages[:, row] = table.index_copy(0, places, ids.int()).view_as(cache.pages[:, row])
    for block, source in zip(cache.ring_blocks, swapped.rings, strict=True):
        block.rings[:, row] = sent(source)
    for name, source in swapped.pool_state.items():
        cache.pool.state[name][ids] = sent(source)
    for state, source in zip(cache.row_state, swapped.row_state, strict=True):
        for name, tensor in source.items():
            state[name][row] = sent(tensor)


def _host(tensor: Tensor) -> Tensor:
    host = _empty(tensor.shape, tensor)
    return host.copy_(tensor)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """In host memory; pinned where it comes from a GPU, so that it can be sent back without waiting."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
