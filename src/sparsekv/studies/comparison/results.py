"""What the tables and pictures of a comparison are made of: its lines by method, ratio and task."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekv.json_lines import Line

TEXT = "perplexity"
DENSE = "dense"
FIRST = (DENSE, "random")
"""Of the methods, the others by name."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None

    def percent(self, digits: int = 0, *, sign: bool = False) -> str:
        mark = "+" if sign else ""
        shown = f"{100 * self.value:{mark}.{digits}f}%"
        if self.low is None or self.high is None:
            return shown
        return f"{shown} ({100 * self.low:{mark}.{digits}f} to {100 * self.high:{mark}.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Results:
    """The lines of quality."""

    lines: Sequence[Line]

    @property
    def ratios(self) -> list[float]:
        """Ascending."""
        return sorted({line["cr"] for line in self.lines if line["cr"]})

    @property
    def kinds(self) -> list[str]:
        """Of questions."""
        return list(dict.fromkeys(line["task"] for line in self.lines if line["task"] != TEXT))

    @property
    def lengths(self) -> list[int]:
        """Of questions."""
        return sorted({line["length"] for line in self.lines if line["task"] != TEXT})

    @property
    def measures_text(self) -> bool:
        return any(line["task"] == TEXT for line in self.lines)

    def methods(self, ratio: float) -> list[str]:
        """Dense first, then as FIRST says."""
        return sorted({DENSE} | {line["method"] for line in self.lines if line["cr"] == ratio}, key=in_order)

    def of(self, method: str, ratio: float | None) -> list[Line]:
        """A method's at a ratio, with what it reads by default: the share of which most was measured, since of other
        shares only running text is. Cells end in any order."""
        cr = None if method == DENSE else ratio
        found = [line for line in self.lines if (line["method"], line["cr"]) == (method, cr)]
        shares = [line["reads"] for line in found]
        return [line for line in found if line["reads"] == max(shares, key=shares.count)]

    def shares(self, ratio: float) -> list[Line]:
        """On running text, a line for each share that a method reads of what it holds, the largest first."""
        found = [x for x in self.lines if x["cr"] == ratio and x["task"] == TEXT and x["reads"] is not None]
        return sorted(found, key=lambda line: -line["reads"])


def in_order(method: str) -> tuple[bool, bool, str]:
    """A key to sort methods by."""
    return method != FIRST[0], method != FIRST[1], method


def text_of(lines: Iterable[Line]) -> Line | None:
    return next((line for line in lines if line["task"] == TEXT), None)


def score(line: Line, name: str) -> Score:
    estimate = line["scores"][name]
    return Score(value=estimate["value"], low=estimate["low"], high=estimate["high"])


def mean(estimates: Iterable[dict[str, Any] | None]) -> Score | None:
    """Of independent scores; their distances to the ends of the intervals are added in quadrature. None of none."""
    found = [estimate for estimate in estimates if estimate is not None]
    if not found:
        return None
    value = sum(estimate["value"] for estimate in found) / len(found)
    below, above = (
        math.sqrt(sum((estimate["value"] - estimate[end]) ** 2 for estimate in found)) / len(found)
        for end in ("low", "high")
    )
    return Score(value=value, low=value - below, high=value + above)


def right(lines: Iterable[Line], *, kind: str | None = None, length: int | None = None) -> Score | None:
    """The share of right answers, of one kind or length or all."""
    chosen = (x for x in lines if x["task"] != TEXT and kind in (None, x["task"]) and length in (None, x["length"]))
    return mean(line["scores"]["accuracy"] for line in chosen)


def read_a_step(line: Line) -> float:
    """Tokens of a KV head: those attended to, and two vectors for each page whose bounds were read."""
    return (line["kv_reads"] + line["bound_reads"]) / line["output_tokens"]


def by_depth(lines: Sequence[Line]) -> dict[str, Score | None]:
    """Right answers by the quarter of the text in which the fact is told, over all kinds and lengths."""
    quarters = dict.fromkeys(quarter for line in lines for quarter in line["by_depth"])
    return {quarter: mean(line["by_depth"].get(quarter) for line in lines) for quarter in quarters}
