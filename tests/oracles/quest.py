"""Quest: nothing is freed; a decoded query reads the pages whose min/max bound promises most. Alone, and over DMS."""

from dataclasses import dataclass, field
from math import ceil

from torch import Tensor

from oracles.dense import Dense, Slot
from oracles.window import DMS


@dataclass(kw_only=True, eq=False)
class Quest(Dense):
    """A page is `page` consecutive slots. k = max(3, ceil(budget / page)) pages are read: the one written to and the
    k - 1 best others, the lower of equals; layers 0 and 1 and prompts read all."""

    budget: int
    page: int
    bound_reads: list[list[int]] = field(default_factory=list, init=False)
    """For each decoded token: by KV head the pages whose bounds were read, that is all or (in dense layers) none."""

    def read(self, head: int, queries: Tensor, *, written: int, prompt: bool) -> list[Slot]:
        slots = self.slots[head]
        pages = [slots[i : i + self.page] for i in range(0, len(slots), self.page)]
        dense = prompt or self.layer < 2
        if not prompt:
            if head == 0:
                self.bound_reads.append([])
            self.bound_reads[-1].append(0 if dense else len(pages))
        if dense:
            return slots
        own = written // self.page
        bounds = [max(upper_bound(q, page) for q in queries) for page in pages]
        others = [i for i in range(len(pages)) if i != own]
        others.sort(key=lambda i: -bounds[i])  # stable: the lower of equals first
        chosen = [own, *others[: max(3, ceil(self.budget / self.page)) - 1]]
        return [slot for i in sorted(chosen) for slot in pages[i]]


def upper_bound(query: Tensor, page: list[Slot]) -> float:
    """No key of the page has a greater dot product with the query [D]."""
    total = 0.0
    for c, q in enumerate(query.tolist()):
        channel = [slot.key[c].item() for slot in page]
        total += max(q * min(channel), q * max(channel))
    return total


@dataclass(kw_only=True, eq=False)
class DMSQuest(Quest, DMS):
    """Slots as DMS fills them, pages and reads as Quest; a bound covers what lies in the page now."""
