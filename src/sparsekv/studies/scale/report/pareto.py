"""Fronts and the margin between two: what a budget buys at best.

A front is the points that no cheaper one equals, joined by straight lines over the budget or its logarithm. The margin
of A over B is

    (1 / |I|) * integral over I of (A(x) - B(x)) dx,     I = [max of the least, min of the largest budgets],

exact for straight lines (Hyper-Scaling, arXiv 2506.05345). A point that gets nothing right is
no point.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Axis = Literal["linear", "log"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Front:
    """budget and accuracy, both strictly ascending, and which of the points given they are."""

    budget: Floats
    accuracy: Floats
    points: NDArray[np.int64]

    def at(self, budgets: ArrayLike, axis: Axis = "linear") -> Floats:
        """The accuracy at budgets; the first and last points' own outside."""
        return np.interp(
            _scaled(np.asarray(budgets, dtype=np.float64), axis), _scaled(self.budget, axis), self.accuracy
        )


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Of one front over another."""

    value: float | None
    """A share, 0.1 = ten points; None where the fronts share no stretch of budgets."""
    doublings: float
    """How many doublings of the budget they share."""


def front(budget: ArrayLike, accuracy: ArrayLike, *, above: float = 0.0) -> Front:
    """Of points with budgets above 0, in any order and shape. above: the accuracy that a point must exceed."""
    x, y = np.asarray(budget, dtype=np.float64).ravel(), np.asarray(accuracy, dtype=np.float64).ravel()
    assert len(x) == len(y) and (x[y > 0] > 0).all()
    order = np.lexsort((-y, x))
    best = np.maximum.accumulate(np.concatenate([[above], y[order]]))
    kept = order[y[order] > best[:-1]]
    return Front(budget=x[kept], accuracy=y[kept], points=kept)


def shared(a: Front, b: Front) -> tuple[float, float] | None:
    """The stretch of budgets that both cover; None where there is none."""
    if not len(a.budget) or not len(b.budget):
        return None
    low, high = max(a.budget[0], b.budget[0]), min(a.budget[-1], b.budget[-1])
    return (float(low), float(high)) if high > low else None


def mean_gap(a: Front, b: Front, stretch: tuple[float, float], axis: Axis = "linear") -> float:
    """The mean of a - b over a stretch of budgets."""
    low, high = stretch
    inner = np.concatenate([a.budget, b.budget])
    x = np.unique(np.concatenate([[low, high], inner[(inner > low) & (inner < high)]]))
    gap, width = a.at(x, axis) - b.at(x, axis), np.diff(_scaled(x, axis))
    return float((0.5 * (gap[1:] + gap[:-1]) * width).sum() / width.sum())


def margin(a: Front, b: Front, axis: Axis = "linear") -> Margin:
    """Of a over b."""
    stretch = shared(a, b)
    if stretch is None:
        return Margin(value=None, doublings=0.0)
    low, high = stretch
    return Margin(value=mean_gap(a, b, stretch, axis), doublings=math.log2(high / low))


def _scaled(budget: Floats, axis: Axis) -> Floats:
    return np.log(budget) if axis == "log" else budget
