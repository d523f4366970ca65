"""Page tables and lengths per (layer, row, head): the ragged cache of all sequences over one pool.

Decode appends or overwrites, so a head never shrinks and nothing is moved. A row is freed whole, pruned once after its
prefill (SnapKV), or forked: full pages in which no slot can be overwritten any more are shared, the rest is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekv.cache.pages import PagePool
from sparsekv.cache.state import LayerState, State
from sparsekv.ops.layout import LayerPages, ring_positions
from sparsekv.ops.release import Tables, release


@dataclass(frozen=True, kw_only=True)
class RingBlock:
    """The rings of all layers that have one size, so that what is done to rows is done to those layers at once."""

    layers: list[int]
    index: Tensor
    """`layers` on the device, int64 [n]."""
    rings: Tensor
    """int32 [n, R, H, W]."""


class RaggedCache:
    """The cache of `rows` sequences.

    windows: ring entries of each layer (0 = nothing is overwritten by the ring rule). rewrites: per layer, whether its
    policy may change any stored slot (default: none). states: per layer, what its policy remembers (cache.state); those
    of pages and slots must be the pool's too. pages: int32 [N, R, H, M]; lengths: int32 [N, R, H]; seen: int32 [N, R];
    rings: per layer int32 [R, H, W], views of ring_blocks; samples: int64 [R + 1], which copy of its prompt a row is, 0
    for nobody's copy.
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
        states: Sequence[Sequence[State]] | None = None,
    ) -> None:
        device, n = pool.kv.device, len(windows)
        columns = -(-max_tokens // pool.page_size)
        self.pool = pool
        self.pages = torch.zeros(n, rows, kv_heads, columns, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(n, rows, kv_heads, dtype=torch.int32, device=device)
        self.seen = torch.zeros(n, rows, dtype=torch.int32, device=device)
        self.ring_blocks = _ring_blocks(windows, kv_heads=kv_heads, rows=rows, device=device)
        self.rings = self._rings()
        self.tickets = torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)  # scratch of the decode kernel
        self.samples = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.rewrites = rewrites or [False] * n
        self._rewritten = torch.tensor(self.rewrites, device=device)
        self.states = [[s for s in layer if s.kind == "row"] for layer in states or [()] * n]
        self.row_state = [{s.name: s.allocate(rows + 1, device=device) for s in layer} for layer in self.states]

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

    def tables(self) -> Tables:
        """Views of all layers at once, for ops.release."""
        return Tables(
            pages=self.pages,
            lengths=self.lengths,
            seen=self.seen,
            free=self.pool.free,
            free_count=self.pool.free_count,
            extra_owners=self.pool.extra_owners,
            page_size=self.pool.page_size,
        )

    def state(self, index: int) -> LayerState:
        """What the policy of one layer remembers."""
        return LayerState(row=self.row_state[index], slot=self.pool.slot_state, page=self.pool.page_state)

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
        """Free all pages of rows (int64, distinct) and empty them, without asking the device."""
        before = self.pool.free_count.clone()
        release(self.tables(), rows)
        self.pool.clear_freed(before, most=len(rows) * self.pages[:, 0].numel())
        self.samples.index_fill_(0, rows, 0)
        for states, tensors in zip(self.states, self.row_state, strict=True):
            for state in states:
                tensors[state.name].index_fill_(0, rows, state.fill)

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
        old, named, target = self.rows, dict[int, int](), []
        for index in indices.tolist():
            target.append(old + len(target) - len(named) if index in named else index)
            named[index] = named.get(index, -1) + 1
        target = torch.tensor(target, dtype=torch.int64, device=indices.device)
        copies, extra = target >= old, len(target) - len(named)
        self._each_by_row(lambda x, dim: torch.cat([x, x.new_zeros(*x.shape[:dim], extra, *x.shape[dim + 1 :])], dim))
        rows = torch.arange(old, device=indices.device)
        try:
            self.fork(indices[copies], target[copies])
            self.samples[target] += _occurrence(indices)
            self.release(rows[~torch.isin(rows, indices)])
            rows = target
        finally:
            self._each_by_row(lambda x, dim: x.index_select(dim, rows))

    def _each_by_row(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every tensor [..., R, ...]: change(tensor, the dimension of rows). Spare places come last again."""
        for name in ("pages", "lengths", "seen"):
            setattr(self, name, change(getattr(self, name), 1))
        self.tickets = change(self.tickets, 0)
        self.ring_blocks = [replace(block, rings=change(block.rings, 1)) for block in self.ring_blocks]
        self.rings = self._rings()
        self.samples = _with_spare(self.samples, change)
        for tensors in self.row_state:
            tensors.update({name: _with_spare(tensor, change) for name, tensor in tensors.items()})

    def fork(self, source: Tensor, target: Tensor) -> None:
        """Make the empty, distinct rows `target` exact copies of `source` (both int64 [n]; sources may repeat).

        Raises ValueError naming the bytes where the pool cannot hold the copied pages; nothing is changed then.
        """
        assert bool((self.lengths[:, target] == 0).all()), "fork needs empty target rows"
        owned = self.owned(source)
        copied = owned & ~self._settled(source)
        old = self.pages[:, source][copied].long()
        new = self.pool.take(len(old))
        for tensor in (self.pool.kv, *self.pool.state.values()):
            tensor[new] = tensor[old]
        self.pool.share(self.pages[:, source][owned & ~copied].long())
        pages = self.pages[:, source]
        pages[copied] = new.int()
        self.pages[:, target] = pages
        self.lengths[:, target] = self.lengths[:, source]
        self.seen[:, target] = self.seen[:, source]
        for block in self.ring_blocks:
            block.rings[:, target] = block.rings[:, source]
        for tensor in (self.samples, *(x for tensors in self.row_state for x in tensors.values())):
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
        for block in self.ring_blocks:
            seen, entries = self.seen[block.index][:, rows], block.rings[:, rows]
            position = ring_positions(seen, entries.shape[-1])
            newest = position == seen[..., None] - 1
            open_ = (position >= 0)[:, :, None] & ((entries & 1).bool() | newest[:, :, None])
            column = torch.where(open_, (entries >> 1) // size, columns).long()
            padded = torch.nn.functional.pad(settled[block.index], (0, 1))
            settled[block.index] = padded.scatter(-1, column, False)[..., :columns]
        return settled & ~self._rewritten[:, None, None, None]

    def _rings(self) -> list[Tensor]:
        """By layer, views of ring_blocks."""
        none = self.lengths.new_zeros(*self.lengths.shape[1:], 0)
        rings = [none] * len(self.seen)
        for block in self.ring_blocks:
            for layer, ring in zip(block.layers, block.rings, strict=True):
                rings[layer] = ring
        return rings

    def index_bytes(self) -> int:
        """Bytes of tables, lengths, rings and what policies remember of rows."""
        rows = [x for tensors in self.row_state for x in tensors.values()]
        return sum(x.numel() * x.element_size() for x in (self.pages, self.lengths, self.seen, *self.rings, *rows))


def _ring_blocks(windows: list[int], *, kv_heads: int, rows: int, device: torch.device) -> list[RingBlock]:
    blocks = []
    for window in sorted(set(windows) - {0}):
        layers = [layer for layer, own in enumerate(windows) if own == window]
        rings = torch.zeros(len(layers), rows, kv_heads, window, dtype=torch.int32, device=device)
        blocks.append(RingBlock(layers=layers, index=torch.tensor(layers, device=device), rings=rings))
    return blocks


def _with_spare(x: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`change` of the rows of x [R + 1, ...], the spare place put back behind them."""
    return torch.cat([change(x[:-1], 0), x[-1:]])


def _occurrence(indices: Tensor) -> Tensor:
    """int64 [n]: how often each index came before."""
    same = indices[:, None] == indices
    return same.tril(-1).sum(-1)
