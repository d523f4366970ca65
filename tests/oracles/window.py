"""Methods that know in advance when a token goes: DMS and StreamingLLM. A prompt is placed like decoded tokens."""

from dataclasses import dataclass, field

from oracles.dense import Dense, Slot


@dataclass(kw_only=True, eq=False)
class DMS(Dense):
    """Token t takes the slot of token t - window if that was marked, before t attends; else it is appended.

    Input `marks` (bool, by the position that decides): the decision made at position p is about token p - lag.
    lag: 0, 1, or the window (immediate eviction)."""

    window: int
    lag: int = 0
    decisions: list[list[bool]] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decisions = [[] for _ in range(self.heads)]

    def place(self, head: int, new: Slot, *, marks: bool) -> int:
        self.decisions[head].append(marks)
        leaves = new.position - self.window
        if leaves >= 0 and self.decisions[head][leaves + self.lag]:
            index = [slot.position for slot in self.slots[head]].index(leaves)
            self.slots[head][index] = new
            return index
        return super().place(head, new)


@dataclass(kw_only=True, eq=False)
class Streaming(Dense):
    """4 sinks and the most recent budget - 4: the new token takes the slot of the oldest that is no sink."""

    budget: int

    def place(self, head: int, new: Slot) -> int:
        slots = self.slots[head]
        if len(slots) < self.budget:
            return super().place(head, new)
        oldest = min((slot for slot in slots if slot.position >= 4), key=lambda slot: slot.position)
        index = slots.index(oldest)
        slots[index] = new
        return index
