"""Methods with a budget: the prompt is read densely and pruned at its end, then a new token takes a victim's slot.

Of equals the lowest slot goes; a pruning keeps the order of slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from oracles.dense import Dense, Slot


def least_important(slots: list[Slot]) -> Slot:
    return min(slots, key=lambda slot: slot.importance)  # min takes the first of equals


def beyond_newest(slots: list[Slot], count: int) -> list[Slot]:
    """All but the `count` newest, in slot order."""
    newest = sorted(slots, key=lambda slot: slot.position)[max(len(slots) - count, 0) :]
    return [slot for slot in slots if slot not in newest]


@dataclass(kw_only=True, eq=False)
class Budget(Dense):
    """budget: tokens that a KV head holds, the new one included."""

    budget: int

    def place(self, head: int, new: Slot) -> int:
        slots = self.slots[head]
        if new.prompt or len(slots) < self.budget:
            return super().place(head, new)
        index = slots.index(self.victim(head, new))
        slots[index] = new
        return index

    def victim(self, head: int, new: Slot) -> Slot:
        raise NotImplementedError

    def prune(self, head: int, losable: list[Slot]) -> None:
        """Drop the least important of `losable` (in slot order) until the budget holds."""
        slots, losable = self.slots[head], list(losable)
        while len(slots) > self.budget:
            least = least_important(losable)
            losable.remove(least)
            slots.remove(least)


@dataclass(kw_only=True, eq=False)
class TOVA(Budget):
    """Importance = weight under the last query, averaged over all query heads; so the KV heads choose alike."""

    def victim(self, head: int, new: Slot) -> Slot:
        return least_important(self.slots[head])

    def observe(self, weights: list[list[Tensor]], *, prompt: bool) -> None:
        all_heads = [w for group in weights for w in group]
        for slots in self.slots:
            for i, slot in enumerate(slots):
                slot.importance = sum(w[i].item() for w in all_heads) / len(all_heads)

    def end_prompt(self, length: int) -> None:
        for head in range(self.heads):
            self.prune(head, self.slots[head])


@dataclass(kw_only=True, eq=False)
class H2O(Budget):
    """Importance = sum of the weights so far, by KV head; the newest budget // 2, the new one included, are safe."""

    def victim(self, head: int, new: Slot) -> Slot:
        return least_important(beyond_newest(self.slots[head], self.budget // 2 - 1))

    def observe(self, weights: list[list[Tensor]], *, prompt: bool) -> None:
        for slots, group in zip(self.slots, weights, strict=True):
            for i, slot in enumerate(slots):
                slot.importance += sum(w[i].item() for w in group)

    def end_prompt(self, length: int) -> None:
        for head in range(self.heads):
            self.prune(head, beyond_newest(self.slots[head], self.budget // 2))


@dataclass(kw_only=True, eq=False)
class Random(Budget):
    """Uniform among what is neither recent nor of a prompt; where prompts and recent window do not fit in the budget,
    among what is not recent.

    uniform(seed, sample, layer, head, position) in [0, 1). The budget is at least 2."""

    uniform: Callable[[int, int, int, int, int], float]
    seed: int = 0
    sample: int = 0
    prompt_tokens: int = field(default=0, init=False)

    def draw(self, head: int, position: int, sample: int) -> float:
        return self.uniform(self.seed, sample, self.layer, head, position)

    def losable(self, head: int, recent: int) -> list[Slot]:
        old = beyond_newest(self.slots[head], recent)
        fits = self.prompt_tokens + self.recent <= self.budget
        return [slot for slot in old if not (fits and slot.prompt)]

    @property
    def recent(self) -> int:
        return min(64, self.budget // 2)

    def victim(self, head: int, new: Slot) -> Slot:
        losable = self.losable(head, self.recent - 1)
        return losable[int(self.draw(head, new.position, self.sample) * len(losable))]

    def end_prompt(self, length: int) -> None:
        self.prompt_tokens += length
        for head in range(self.heads):
            for slot in self.slots[head]:
                slot.importance = self.draw(head, slot.position, 0)  # copies share their prompt
            self.prune(head, self.losable(head, self.recent))


@dataclass(kw_only=True, eq=False)
class SnapKV(Budget):
    """Importance = pooled weights of the prompt's last 32 queries, by KV head; decoded tokens are appended.

    The budget is the prompt's, above 32."""

    prompt_weights: list[list[list[Tensor]]] = field(default_factory=list, init=False)
    """This prompt's, by query, KV head and query head of its group."""

    def place(self, head: int, new: Slot) -> int:
        return Dense.place(self, head, new)

    def observe(self, weights: list[list[Tensor]], *, prompt: bool) -> None:
        if prompt:
            self.prompt_weights.append(weights)

    def end_prompt(self, length: int) -> None:
        for head in range(self.heads):
            earlier = self.slots[head][:-32]
            sums = [0.0] * len(earlier)
            for weights in self.prompt_weights[-32:]:
                for w in weights[head]:
                    for i in range(min(len(earlier), len(w))):  # a query sees no slot after its own
                        sums[i] += w[i].item()
            for i, slot in enumerate(earlier):
                slot.importance = sum(sums[max(i - 2, 0) : i + 3]) / 5
            self.prune(head, earlier)
        self.prompt_weights = []
