"""Take back a prefill that failed half-way, so that the cache is as it was before.

Pages come off the top of the free stack and nothing is pushed during a forward, so putting the count back frees them.
The only stored tokens that a prefill overwrites are the marked ones that leave the window; those are saved.
"""

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.layout import Batch
from sparsekv.ops.place.reference import expired


class Rollback:
    """Remembers a RaggedCache at the start of a prefill."""

    def __init__(self, ragged: RaggedCache) -> None:
        self.ragged = ragged
        self.lengths = ragged.lengths.clone()
        self.seen = ragged.seen.clone()
        self.free_count = ragged.pool.free_count.clone()
        self.rings: dict[int, Tensor] = {}
        self.saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def remember(self, index: int, batch: Batch) -> None:
        """Save what placing `batch` in layer `index` would overwrite. Call before marks are aligned and placed."""
        layer = self.ragged.layer(index)
        if layer.window == 0:
            return
        self.rings[index] = layer.ring.clone()
        seen = layer.seen[batch.rows]
        freed, slots = expired(layer, batch.rows, seen, seen + batch.counts)
        taken = torch.arange(slots.shape[-1], device=slots.device) < freed.sum(-1)[..., None]
        b, h, _ = taken.nonzero(as_tuple=True)
        slot = slots[taken].long()
        page = layer.pages[batch.rows[b], h, slot // layer.page_size].long()
        offset = slot % layer.page_size
        self.saved.append((page, offset, layer.kv[page, :, offset]))

    def restore(self) -> int:
        """Put everything back; returns how many pages the prefill had taken."""
        ragged = self.ragged
        taken = int(self.free_count - ragged.pool.free_count)
        ragged.lengths.copy_(self.lengths)
        ragged.seen.copy_(self.seen)
        ragged.pool.free_count.copy_(self.free_count)
        for index, ring in self.rings.items():
            ragged.rings[index].copy_(ring)
        for page, offset, kv in self.saved:
            ragged.pool.kv[page, :, offset] = kv
        return taken
