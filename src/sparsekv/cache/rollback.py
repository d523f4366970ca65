"""Take back a prefill that failed half-way, so that the cache is as it was before.

Pages come off the top of the free stack and nothing is pushed during a forward, so putting the count back frees them.
The only stored tokens that a prefill overwrites are the marked ones that leave the window, the newest, which it may
mark itself (lag), and, where the policy merges tokens, the last slot of each head; those are saved, and so is the
policies' state.
"""

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.layout import Batch, LayerPages
from sparsekv.ops.place.reference import expired


class Rollback:
    """Remembers a RaggedCache at the start of a prefill."""

    def __init__(self, ragged: RaggedCache) -> None:
        self.ragged = ragged
        self.lengths = ragged.lengths.clone()
        self.seen = ragged.seen.clone()
        self.free_count = ragged.pool.free_count.clone()
        self.rings: dict[int, Tensor] = {}
        self.row_state: dict[int, dict[str, Tensor]] = {}
        self.pool_state: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def remember(self, index: int, batch: Batch) -> None:
        """Save what placing `batch` in layer `index` would overwrite. Call before marks are aligned and placed."""
        layer = self.ragged.layer(index)
        self.row_state[index] = {name: tensor.clone() for name, tensor in self.ragged.row_state[index].items()}
        if self.ragged.pool.state:
            ids = layer.pages[batch.rows][self.ragged.owned(batch.rows)[index]].long()
            self.pool_state.append((ids, {name: tensor[ids] for name, tensor in self.ragged.pool.state.items()}))
        if self.ragged.rewrites[index]:
            last = layer.lengths[batch.rows][..., None] - 1
            self._save(layer, batch, last, last >= 0)
        if layer.window:
            self.rings[index] = layer.ring.clone()
            seen = layer.seen[batch.rows]
            freed, slots = expired(layer, batch.rows, seen, seen + batch.counts)
            entry = torch.arange(slots.shape[-1], device=slots.device)
            self._save(layer, batch, slots, entry < freed.sum(-1)[..., None])
            newest = ((seen - 1) % layer.window).long()
            slots = layer.ring[batch.rows, :, newest][..., None] >> 1
            self._save(layer, batch, slots, (seen > 0)[:, None, None].expand_as(slots))

    def _save(self, layer: LayerPages, batch: Batch, slots: Tensor, chosen: Tensor) -> None:
        """slots: int [B, H, n], of which those in chosen (bool, the same shape) are saved."""
        b, h, _ = chosen.nonzero(as_tuple=True)
        slot = slots[chosen].long()
        page = layer.pages[batch.rows[b], h, slot // layer.page_size].long()
        offset = slot % layer.page_size
        self.saved.append((page, offset, layer.kv[page, :, offset]))

    def restore(self) -> int:
        """Put everything back; returns how many pages the prefill had taken. Interrupted, it can be called again."""
        ragged = self.ragged
        taken = int(self.free_count - ragged.pool.free_count)
        ragged.lengths.copy_(self.lengths)
        ragged.seen.copy_(self.seen)
        for index, ring in self.rings.items():
            ragged.rings[index].copy_(ring)
        for index, state in self.row_state.items():
            ragged.row_state[index].update(state)
        free = int(self.free_count)
        ragged.pool.clear_state(ragged.pool.free[max(free - taken, 0) : free].long())
        for ids, state in self.pool_state:
            for name, tensor in state.items():
                ragged.pool.state[name][ids] = tensor
        for page, offset, kv in self.saved:
            ragged.pool.kv[page, :, offset] = kv
        ragged.pool.free_count.copy_(self.free_count)
        return taken
