"""Dynamic Memory Compression (arXiv 2403.09636): a token is appended, or merged into the last slot as a weighted mean.

z' = z + w,  key' = (z key + w k) / z',  value' = (z value + w v) / z'.
"""

from dataclasses import dataclass

from oracles.dense import Dense, Slot


@dataclass(kw_only=True, eq=False)
class DMC(Dense):
    """Inputs `merge` (bool) and `weights` (above 0): the decision and the importance, by token and KV head."""

    def place(self, head: int, new: Slot, *, merge: bool, weights: float) -> int:
        new.weight = weights
        if not merge or not self.slots[head]:
            return super().place(head, new)
        old = self.slots[head][-1]
        total = old.weight + weights
        self.slots[head][-1] = Slot(
            position=old.position,
            key=(old.weight * old.key + weights * new.key) / total,
            value=(old.weight * old.value + weights * new.value) / total,
            prompt=old.prompt,
            weight=total,
        )
        return len(self.slots[head]) - 1
