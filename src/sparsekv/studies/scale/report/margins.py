"""Margins of every method over every other, by task and in the mean over tasks, with 95 % intervals.

Problems are resampled RESAMPLES times, the same ones for all methods of a task, and fronts and margins made anew, over
the budgets that the fronts of all problems share. A method's front is over all its ratios, W and L.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sparsekv.studies.scale.cells import BUDGETS
from sparsekv.studies.scale.report.pareto import Axis, Front, Margin, front, margin, mean_gap, shared
from sparsekv.studies.scale.report.tables import Table

RESAMPLES = 500
AXES: tuple[Axis, ...] = get_args(Axis)
ALL, VOTED = "mean over tasks", "mean over voted tasks"
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method over another at equal budgets. Values are shares; None where they share no budgets."""

    method: str
    over: str
    task: str
    """A task, or a mean over tasks."""
    budget: str
    axis: str
    margin: float | None
    low: float | None
    high: float | None
    doublings: float
    """Of the budget, that both fronts cover; in a mean, the least."""
    tasks: int
    """How many are in it."""

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def compare(
    made: Sequence[Table], *, budgets: Sequence[str] = tuple(BUDGETS), resamples: int = RESAMPLES
) -> list[Compared]:
    """All ordered pairs of methods, at each budget, on each axis; of the problems that a task's methods share."""
    methods = list(dict.fromkeys(table.cell.method.name for table in made))
    by_task: dict[str, list[Table]] = {}
    for table in made:
        by_task.setdefault(table.cell.task, []).append(table)
    voted = {task for task, own in by_task.items() if own[0].voted}
    found: list[Compared] = []
    for budget in budgets:
        fronts = {task: _fronts(own, budget, resamples) for task, own in by_task.items()}
        for axis in AXES:
            for method, over in permutations(methods, 2):
                rows = {
                    task: _resampled(own[method], own[over], axis)
                    for task, own in fronts.items()
                    if method in own and over in own
                }
                named = {task: [task] for task in rows} | {ALL: list(rows), VOTED: [t for t in rows if t in voted]}
                about = {"method": method, "over": over, "budget": budget, "axis": axis}
                for name, tasks in named.items():
                    if tasks:
                        found.append(_compared([rows[task] for task in tasks], task=name, **about))
    return found


def _resampled(a: Sequence[Front], b: Sequence[Front], axis: Axis) -> tuple[Margin, list[float]]:
    """Of all problems, then of each resample over the same budgets; nothing where the fronts share none."""
    stretch = shared(a[0], b[0])
    resampled = [] if stretch is None else [mean_gap(*pair, stretch, axis) for pair in zip(a[1:], b[1:], strict=True)]
    return margin(a[0], b[0], axis), resampled


def _fronts(own: Sequence[Table], budget: str, resamples: int) -> dict[str, list[Front]]:
    """By method: the front of all problems, then of each resample."""
    common = [name for name in own[0].problems if all(name in table.problems for table in own)]
    if not common:
        return {}
    count = len(common)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    weights = np.concatenate([np.full((1, count), 1 / count), drawn])
    out: dict[str, list[Front]] = {}
    for method in dict.fromkeys(table.cell.method.name for table in own):
        points = [_points(table, common, budget) for table in own if table.cell.method.name == method]
        cost, accuracy = (weights @ np.concatenate(part, axis=1) for part in zip(*points, strict=True))
        # of all problems: in a resample without the one that was right a point counts, with nothing right
        right = accuracy[0] > 0
        out[method] = [front(x[right], y[right], above=-1.0) for x, y in zip(cost, accuracy, strict=True)]
    return out


def _points(table: Table, common: Sequence[str], budget: str) -> tuple[Floats, Floats]:
    """(cost, accuracy), [common problems, W * L]."""
    at = [table.problems.index(name) for name in common]
    return table.costs[budget][at].reshape(len(at), -1), table.accuracy[at].reshape(len(at), -1)


def _compared(found: Sequence[tuple[Margin, list[float]]], **about: str) -> Compared:
    """found: by task, as _resampled gives them. Tasks without a margin are left out."""
    values = [own.value for own, _ in found if own.value is not None]
    if not values:
        return Compared(**about, margin=None, low=None, high=None, doublings=0.0, tasks=0)
    resampled = np.mean([gaps for own, gaps in found if own.value is not None], axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    doublings = min(own.doublings for own, _ in found if own.value is not None)
    return Compared(**about, margin=float(np.mean(values)), low=low, high=high, doublings=doublings, tasks=len(values))
