"""Page tables and lengths per (layer, row, head): the ragged cache of all sequences over one pool.

Decode appends or overwrites, so a head never shrinks and nothing is moved. A row is freed whole, pruned once after its
prefill (SnapKV), or forked: full pages in which no slot can be overwritten any more are shared, the rest is copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekv.cache.pages import PagePool
from sparsekv.ops.layout import LayerPages, ring_positions


class RaggedCache:
    """The cache of `rows` sequences.

    windows: ring entries of each layer (0 = nothing is overwritten by the ring rule). rewrites: per layer, whether its
    policy may change any stored slot (default: none). pages: int32 [N, R, H, M]; lengths: int32 [N, R, H]; seen: int32
    [N, R]; rings: per layer int32 [R, H, W]; state: per layer, the policy's own tensors [R, ...] by name.
    """

    def __init__(
        self,
        pool: PagePool,
        windows: list[int],
        *,
        kv_heads: int,
        rows: int,
        max_tokens: int,
        rewrites: list[bool] | None = None,
    ) -> None:
        device, n = pool.kv.device, len(windows)
        columns = -(-max_tokens // pool.page_size)
        self.pool = pool
        self.pages = torch.zeros(n, rows, kv_heads, columns, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(n, rows, kv_heads, dtype=torch.int32, device=device)
        self.seen = torch.zeros(n, rows, dtype=torch.int32, device=device)
        self.rings = [torch.zeros(rows, kv_heads, w, dtype=torch.int32, device=device) for w in windows]
        self.tickets = torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)  # scratch of the decode kernel
        self.rewrites = rewrites or [False] * n
        self.state: list[dict[str, Tensor]] = [{} for _ in windows]

    @property
    def rows(self) -> int:
        return self.lengths.shape[1]

    def layer(self, index: int) -> LayerPages:
        """Views of one layer."""
        return LayerPages(
            kv=self.pool.kv,
            pages=self.pages[index],
            lengths=self.lengths[index],
            ring=self.rings[index],
            seen=self.seen[index],
            free=self.pool.free,
            free_count=self.pool.free_count,
            tickets=self.tickets,
        )

    def grow(self, max_tokens: int) -> None:
        """Widen the page tables, at least by doubling, so that every head can hold max_tokens slots."""
        have, want = self.pages.shape[-1], -(-max_tokens // self.pool.page_size)
        if want > have:
            self.pages = torch.nn.functional.pad(self.pages, (0, max(want, 2 * have) - have))

    def owned(self, rows: Tensor) -> Tensor:
        """bool [N, len(rows), H, M]: page-table entries in use."""
        count = -(-self.lengths[:, rows] // self.pool.page_size)
        return torch.arange(self.pages.shape[-1], device=count.device) < count[..., None]

    def release(self, rows: Tensor) -> None:
        """Free all pages of rows (int64, distinct) and empty them."""
        self.pool.release(self.pages[:, rows][self.owned(rows)].long())
        self.lengths[:, rows] = 0
        self.seen[:, rows] = 0
        for state in self.state:
            for tensor in state.values():
                tensor[rows] = 0

    def clear(self) -> None:
        """Free all pages of all rows."""
        self.release(torch.arange(self.rows, device=self.lengths.device))

    def reset(self) -> None:
        """Empty all rows without asking what they own, after a forward that failed half-way. In place."""
        self.pool.reset()
        self.lengths.zero_()
        self.tickets.zero_()
        self.clear()

    def select(self, indices: Tensor) -> None:
        """Row i becomes an exact copy of row indices[i] (int64 [n]); unnamed rows are freed and n rows are left.

        A row is moved once and copied where it is named again. Raises ValueError naming the bytes where the pool cannot
        hold the copies; nothing is changed then.
        """
        old, moved, target = self.rows, set[int](), []
        for index in indices.tolist():
            target.append(old + len(target) - len(moved) if index in moved else index)
            moved.add(index)
        target = torch.tensor(target, dtype=torch.int64, device=indices.device)
        copies, extra = target >= old, len(target) - len(moved)
        for name in ("pages", "lengths", "seen"):
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, tensor.new_zeros(len(tensor), extra, *tensor.shape[2:])], dim=1))
        self._each_by_row(lambda tensor: torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])]))
        rows = torch.arange(old, device=indices.device)
        try:
            self.fork(indices[copies], target[copies])
            self.release(rows[~torch.isin(rows, indices)])
            rows = target
        finally:
            self.pages, self.lengths, self.seen = self.pages[:, rows], self.lengths[:, rows], self.seen[:, rows]
            self._each_by_row(lambda tensor: tensor[rows])

    def _each_by_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor whose first dimension is the rows."""
        self.tickets = change(self.tickets)
        self.rings = [change(ring) for ring in self.rings]
        for state in self.state:
            state.update({name: change(tensor) for name, tensor in state.items()})

    def fork(self, source: Tensor, target: Tensor) -> None:
        """Make the empty, distinct rows `target` exact copies of `source` (both int64 [n]; sources may repeat).

        Raises ValueError naming the bytes where the pool cannot hold the copied pages; nothing is changed then.
        """
        assert bool((self.lengths[:, target] == 0).all()), "fork needs empty target rows"
        owned = self.owned(source)
        copied = owned & ~self._settled(source)
        old = self.pages[:, source][copied].long()
        new = self.pool.take(len(old))
        self.pool.kv[new] = self.pool.kv[old]
        self.pool.share(self.pages[:, source][owned & ~copied].long())
        pages = self.pages[:, source]
        pages[copied] = new.int()
        self.pages[:, target] = pages
        self.lengths[:, target] = self.lengths[:, source]
        self.seen[:, target] = self.seen[:, source]
        for tensor in (*self.rings, *(tensor for state in self.state for tensor in state.values())):
            tensor[target] = tensor[source]

    def fork_cost(self, source: Tensor) -> int:
        """The pages that one fork of each row in source (int64 [n]) would take."""
        return int((self.owned(source) & ~self._settled(source)).sum())

    def _settled(self, rows: Tensor) -> Tensor:
        """bool [N, len(rows), H, M]: full pages none of whose slots a later token can take.

        By the ring rule, only tokens still in the ring can be overwritten: the marked ones and, where marks lag, the
        newest.
        """
        size, columns = self.pool.page_size, self.pages.shape[-1]
        settled = torch.arange(columns, device=rows.device) < (self.lengths[:, rows] // size)[..., None]
        for index, ring in enumerate(self.rings):
            if ring.shape[-1]:
                position = ring_positions(self.seen[index, rows], ring.shape[-1])
                newest = position == self.seen[index, rows][:, None] - 1
                entries = ring[rows]
                open_ = (position >= 0)[:, None] & ((entries & 1).bool() | newest[:, None])
                column = torch.where(open_, (entries >> 1) // size, columns).long()
                padded = torch.nn.functional.pad(settled[index], (0, 1))
                settled[index] = padded.scatter(-1, column, False)[..., :columns]
            if self.rewrites[index]:
                settled[index] = False
        return settled

    def prune(self, index: int, rows: Tensor, keep: Tensor) -> None:
        """Keep only the slots of layer `index` in keep (bool [len(rows), H, longest head]), moved together in order.

        For layers without a ring (policies that mark nothing); exclusive pages only.
        """
        assert self.rings[index].shape[-1] == 0, "prune needs a layer without a ring"
        size = self.pool.page_size
        for b, row in enumerate(rows.tolist()):
            for h in range(keep.shape[1]):
                length = int(self.lengths[index, row, h])
                kept = keep[b, h, :length].nonzero()[:, 0]
                table = self.pages[index, row, h].long()
                left = -(-len(kept) // size)
                moved = self.pool.kv[table[kept // size], :, kept % size]
                to = torch.arange(len(kept), device=kept.device)
                self.pool.kv[table[to // size], :, to % size] = moved
                self.pool.release(table[left : -(-length // size)])
                self.lengths[index, row, h] = len(kept)

    def index_bytes(self) -> int:
        """Bytes of tables, lengths and rings."""
        return sum(t.numel() * t.element_size() for t in (self.pages, self.lengths, self.seen, *self.rings))
