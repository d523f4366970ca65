"""A cell of a study: one method at one ratio on one task with one seed. It is drawn once, at the largest W and L."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparsekv.evals.methods.setting import Setting

DENSE = "dense"
BUDGETS = {
    "reads": "KV reads",
    "peak_tokens": "peak tokens",
    "peak_bytes": "peak bytes",
    "seconds": "seconds",
    "tokens": "tokens drawn",
}
"""What a configuration costs a problem, and its name for readers."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A line of the study's methods: a policy, with what else it needs."""

    name: str
    policy: str
    ratios: tuple[float, ...]
    adapter: str | None = None
    """Trained heads: a folder or a hub id."""
    model: str

    def setting(self, ratio: float, *, tokens: int) -> Setting:
        """At a ratio of sequences of `tokens` tokens. What DMS + Quest reads is a quarter of what DMS would hold.

        Raises ValueError for what cannot be had.
        """
        if self.policy == DENSE:
            return Setting()
        budget = max(1, math.ceil(tokens / (4 * ratio))) if self.policy == "dms-quest" else None
        return Setting(policy=self.policy, adapter=self.adapter, cr=ratio, budget=budget)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One draw."""

    method: Method
    ratio: float
    task: str
    seed: int

    @property
    def key(self) -> str:
        """The method and its ratio: "dms@4", "dense"."""
        return self.method.name if self.method.policy == DENSE else f"{self.method.name}@{self.ratio:g}"

    @property
    def name(self) -> str:
        """ "dms@4/times-7/0" """
        return f"{self.key}/{self.task}/{self.seed}"


def chosen(cells: Sequence[Cell], patterns: Sequence[str] | None) -> list[Cell]:
    """The cells whose name, method, ratio or task is one of the patterns, with * for anything; None = all.

    Raises ValueError for a pattern that fits none.
    """
    if patterns is None:
        return list(cells)

    def fits(cell: Cell, pattern: str) -> bool:
        return any(fnmatchcase(text, pattern) for text in (cell.name, cell.method.name, cell.key, cell.task))

    for pattern in patterns:
        if not any(fits(cell, pattern) for cell in cells):
            raise ValueError(f"no cell is called {pattern!r}; the study has {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if any(fits(cell, pattern) for pattern in patterns)]
