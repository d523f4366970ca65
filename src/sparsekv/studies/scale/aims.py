"""What compressed chains were to win by, in points of accuracy at equal budgets, and whether they did."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsekv.studies.scale.margins import ALL, VOTED, Compared
from sparsekv.studies.scale.tables import BUDGETS

AXIS = "linear"


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Points in the mean over all tasks, and over the voted ones; with an interval that excludes zero."""

    method: str
    over: str
    budget: str
    mean: float
    voted: float | None = None


AIMS = (
    Aim(method="dms", over="dense", budget="reads", mean=10, voted=5),
    Aim(method="dms", over="dense", budget="peak_tokens", mean=15, voted=6),
    Aim(method="dms", over="dense", budget="seconds", mean=5, voted=3),
    Aim(method="dms", over="tova", budget="peak_tokens", mean=4, voted=3),
    Aim(method="dms", over="h2o", budget="peak_tokens", mean=6),
    Aim(method="dms", over="random", budget="peak_tokens", mean=6),
    Aim(method="dms", over="quest", budget="reads", mean=2),
)
HEAD = ("margin, points", "at equal", "tasks", "aimed at", "measured (95 % interval)", "")


def verdicts(compared: Sequence[Compared]) -> list[list[str]]:
    """A row of HEAD for each aim whose methods were compared."""
    rows = []
    for aim in AIMS:
        for scope, least in ((ALL, aim.mean), (VOTED, aim.voted)):
            found = [
                c
                for c in compared
                if (c.method, c.over, c.budget, c.axis, c.task) == (aim.method, aim.over, aim.budget, AXIS, scope)
            ]
            if least is None or not found:
                continue
            about = [f"{aim.method} - {aim.over}", BUDGETS[aim.budget], scope.removeprefix("mean over "), f"{least:+g}"]
            rows.append([*about, *_verdict(found[0], least)])
    return rows


def _verdict(found: Compared, least: float) -> tuple[str, str]:
    if found.margin is None or found.low is None or found.high is None:
        return "no budget in common", "missed"
    value, low, high = (100 * x for x in (found.margin, found.low, found.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})", "met" if value >= least and low > 0 else "missed"
