"""The pool: pages of C token slots of one KV head's keys and values, allocated once for all rows, layers and heads.

Free pages form a stack on the device, so that taking one in a decode step needs no host. A page may have several owners
(a forked prompt); `extra_owners` counts those beyond the first, so that a fresh page needs no write.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekv.cache.state import State

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: int | str) -> int:
    """Bytes from 123, "512MiB" or "2 GiB". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size of memory; write a number of bytes or one like '512MiB' or '2GiB'")
    return int(float(match[1]) * unit)


def human_bytes(count: float) -> str:
    """Bytes in the unit that reads best: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


class PagePool:
    """kv: [pages, 2, page_size, head_dim]; free: int32 [pages + 1], the last a spare place; free_count: int32 [1];
    extra_owners: int32 [pages]; slot_state, page_state: what policies remember of each, see cache.state."""

    def __init__(
        self,
        pages: int,
        *,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        states: Sequence[State] = (),
        kv: Tensor | None = None,
    ) -> None:
        """kv: the pages themselves, where someone else has allocated them; what they hold is forgotten."""
        self.kv = torch.zeros(pages, 2, page_size, head_dim, dtype=dtype, device=device) if kv is None else kv
        self.free = torch.arange(pages - 1, -2, -1, dtype=torch.int32, device=device)
        self.free_count = torch.full((1,), pages, dtype=torch.int32, device=device)
        self.extra_owners = torch.zeros(pages, dtype=torch.int32, device=device)
        device = self.kv.device
        self.states = {state.name: state for state in states if state.kind != "row"}
        slot, page = ([s for s in self.states.values() if s.kind == kind] for kind in ("slot", "page"))
        self.slot_state = {s.name: s.allocate(pages + 1, page_size, device=device) for s in slot}
        self.page_state = {s.name: s.allocate(pages + 1, device=device) for s in page}

    @property
    def pages(self) -> int:
        return self.kv.shape[0]

    @property
    def page_size(self) -> int:
        return self.kv.shape[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, what policies remember of it included."""
        if not self.pages:
            return 0
        return sum(x[0].numel() * x.element_size() for x in (self.kv, *self.state.values()))

    @property
    def state(self) -> dict[str, Tensor]:
        """All that follows a page, by name: [pages + 1, ...]."""
        return self.slot_state | self.page_state

    @property
    def pages_free(self) -> int:
        return int(self.free_count)

    @property
    def pages_in_use(self) -> int:
        return self.pages - self.pages_free

    def take(self, count: int) -> Tensor:
        """Ids of `count` pages, int64, off the free list. Raises ValueError naming the bytes where there are fewer."""
        free = self.pages_free
        if count > free:
            raise ValueError(self.shortage(count))
        return self.take_surely(count)

    def take_surely(self, count: int) -> Tensor:
        """As take, where it is known that there are so many: without asking the device."""
        self.free_count -= count
        return self.free[(self.free_count + torch.arange(count, device=self.free.device)).clamp(min=0)].long()

    def clear_state(self, ids: Tensor) -> None:
        """Fill the state of pages anew; ids: int64 [n], the spare place among them if need be."""
        for name, tensor in self.state.items():
            tensor.index_fill_(0, ids, self.states[name].fill)

    def clear_freed(self, before: Tensor, *, most: int) -> None:
        """Fill the state of the pages that came onto the free stack since it held `before` (int32 [1]); most: at least
        as many."""
        if self.state:
            place = before + torch.arange(min(most, self.pages), device=before.device)
            ids = self.free[place.clamp(max=self.pages)]
            self.clear_state(torch.where(place < self.free_count, ids, self.pages).long())

    def share(self, ids: Tensor) -> None:
        """Give each page in ids (int64 [n], may repeat) one owner more."""
        self.extra_owners += torch.bincount(ids, minlength=self.pages).int()

    def reset(self) -> None:
        """Take every page away from its owners, in place."""
        first = self.pages - 1
        self.free.copy_(torch.arange(first, first - len(self.free), -1, dtype=torch.int32, device=self.free.device))
        self.free_count.fill_(self.pages)
        self.extra_owners.zero_()
        for name, tensor in self.state.items():
            tensor.fill_(self.states[name].fill)

    def shortage(self, needed: int) -> str:
        """The sentence for a request that does not fit."""
        size = self.page_bytes
        return (
            f"the KV pool is full: {human_bytes(needed * size)} ({needed} pages) are needed and "
            f"{human_bytes(self.pages_free * size)} of {human_bytes(self.pages * size)} are free; "
            "pass a larger kv_memory, raise the compression ratio, or use fewer or shorter sequences"
        )
