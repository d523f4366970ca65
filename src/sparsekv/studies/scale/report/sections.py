"""What a report says, before it is a page: paragraphs, tables and pictures, from tables and margins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsekv.studies.pictures import Curve, Panel, draw
from sparsekv.studies.scale.aims import Aim
from sparsekv.studies.scale.cells import BUDGETS, DENSE
from sparsekv.studies.scale.report.margins import ALL, VOTED, Compared
from sparsekv.studies.scale.report.pareto import front
from sparsekv.studies.scale.report.tables import Table
from sparsekv.studies.scale.study import Study

SHOWN = {"reads": (1e3, "KV reads a problem, thousands"), "peak_tokens": (1.0, "peak tokens a problem"),
         "peak_bytes": (2**20, "peak MiB a problem"), "seconds": (1.0, "seconds a problem")}  # fmt: skip
"""Budgets of the tables and pictures: what one unit is, and the axis."""
VERDICT = ("margin, points", "at equal", "tasks", "aimed at", "measured (95 % interval)", "")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a paragraph, and a table or a picture."""

    title: str
    detail: bool = False
    """Whether only the HTML page has it."""
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A point: W chains of L tokens of a method at a ratio."""

    key: str
    width: int
    length: int
    cost: float
    accuracy: float

    def __str__(self) -> str:
        return f"{self.width}-{self.length} {self.key}: {self.accuracy:.0%}"


def sections(study: Study, made: Sequence[Table], compared: Sequence[Compared], folder: Path) -> list[Section]:
    """In reading order; the pictures are drawn into `folder`."""
    tasks = list(dict.fromkeys(table.cell.task for table in made))
    found = [_aims(study, compared)] if study.aims else []
    found += [
        Section(
            title=f"Accuracy at equal {BUDGETS[budget]}",
            detail=budget == "peak_bytes",
            text="Each method's front over all its ratios, W and L; points that get nothing right are left out.",
            picture=_picture(study, made, tasks, budget, folder / f"{budget}.png"),
        )
        for budget in SHOWN
    ]
    found.append(_one_chain(study, made))
    found += _margins(compared, tasks)
    found += [_best(study, made, task, budget) for task in tasks for budget in ("reads", "peak_tokens")]
    return found


def verdicts(aims: Sequence[Aim], compared: Sequence[Compared]) -> list[list[str]]:
    """A row of VERDICT for each aim whose methods were compared."""
    found = {(c.method, c.over, c.budget, c.task): c for c in compared if c.axis == "linear"}
    rows = []
    for aim in aims:
        for scope, least in ((ALL, aim.mean), (VOTED, aim.voted)):
            margin = found.get((aim.method, aim.over, aim.budget, scope))
            if least is not None and margin is not None:
                about = [f"{aim.method} - {aim.over}", BUDGETS[aim.budget], scope.removeprefix("mean over ")]
                rows.append([*about, f"{least:+g}", *_verdict(margin, least)])
    return rows


def front_of(study: Study, made: Sequence[Table], budget: str) -> list[Configuration]:
    """The front of tables of one task, cheapest first."""
    points = [
        Configuration(
            key=table.cell.key,
            width=width,
            length=length,
            cost=float(table.costs[budget][:, wi, li].mean()),
            accuracy=float(table.accuracy[:, wi, li].mean()),
        )
        for table in made
        for wi, width in enumerate(sorted(study.widths))
        for li, length in enumerate(sorted(study.lengths))
    ]
    points = [point for point in points if point.accuracy > 0]
    return [points[i] for i in front([p.cost for p in points], [p.accuracy for p in points]).points]


def _methods(made: Sequence[Table], task: str) -> dict[str, list[Table]]:
    found: dict[str, list[Table]] = {}
    for table in made:
        if table.cell.task == task:
            found.setdefault(table.cell.method.name, []).append(table)
    return found


def _picture(study: Study, made: Sequence[Table], tasks: Sequence[str], budget: str, file: Path) -> Path:
    unit, label = SHOWN[budget]
    panels = []
    for task in tasks:
        curves = []
        for method, own in _methods(made, task).items():
            points = front_of(study, own, budget)
            curves.append(
                Curve(
                    name=method,
                    x=[point.cost / unit for point in points],
                    y=[point.accuracy for point in points],
                    bold=own[0].cell.method.policy == "dms",
                )
            )
        rule = "vote" if _methods(made, task)[next(iter(_methods(made, task)))][0].voted else "pass@all"
        panels.append(Panel(title=f"{task} ({rule})", xlabel=label, ylabel="right", curves=curves, percent_y=True))
    draw(panels, file)
    return file


def _aims(study: Study, compared: Sequence[Compared]) -> Section:
    return Section(
        title="What was aimed at",
        text="Fronts over all ratios, W and L, compared over the budgets that both cover.",
        head=VERDICT,
        rows=verdicts(study.aim_list, compared),
    )


def _verdict(found: Compared, least: float) -> tuple[str, str]:
    if found.margin is None or found.low is None or found.high is None:
        return "no budget in common", "missed"
    value, low, high = (100 * x for x in (found.margin, found.low, found.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})", "met" if value >= least and low > 0 else "missed"


def _margins(compared: Sequence[Compared], tasks: Sequence[str]) -> list[Section]:
    """Every method over dense, and every one with trained heads over the others: first means over tasks, then tasks."""
    found = []
    means = [name for name in (ALL, VOTED) if any(c.task == name for c in compared)]
    for axis in ("linear", "log"):
        for title, scopes in (("Margins", means), ("Margins by task", list(tasks))):
            pairs = dict.fromkeys((c.method, c.over, c.task) for c in compared if c.task in scopes and _told(c))
            rows = [
                [f"{method} - {over}", task, *(_shown(compared, method, over, task, b, axis) for b in SHOWN)]
                for method, over, task in pairs
            ]
            found.append(
                Section(
                    title=f"{title}, {axis} budget axis",
                    detail=axis == "log",
                    text="Points of accuracy at equal budgets (95 % interval over problems) [doublings of the budget "
                    "that both cover, the least of the tasks]; a dash where they share none.",
                    head=["method - other", "task", *(BUDGETS[b] for b in SHOWN)],
                    rows=rows,
                )
            )
    return found


def _told(c: Compared) -> bool:
    return c.over == DENSE or c.method != DENSE and c.method.startswith("dms") and not c.over.startswith("dms")


def _shown(compared: Sequence[Compared], method: str, over: str, task: str, budget: str, axis: str) -> str:
    for c in compared:
        if (c.method, c.over, c.task, c.budget, c.axis) == (method, over, task, budget, axis):
            if c.margin is None:
                return "-"
            interval = "" if c.low is None or c.high is None else f" ({100 * c.low:+.1f} to {100 * c.high:+.1f})"
            return f"{100 * c.margin:+.1f}{interval} [{c.doublings:.1f}]"
    return "-"


def _one_chain(study: Study, made: Sequence[Table]) -> Section:
    widths, last = sorted(study.widths), len(study.lengths) - 1
    rows = []
    for table in made:
        one = table.estimate(0, last)
        interval = "" if one.low is None else f" ({one.low:.0%} to {one.high:.0%})"
        accuracies = [f"{table.accuracy[:, wi, last].mean():.0%}" for wi in range(1, len(widths))]
        cost = {name: float(table.costs[name][:, 0, last].mean()) / widths[0] for name in BUDGETS}
        rows.append(
            [
                table.cell.task, table.cell.key, str(len(table.problems)), f"{one.value:.0%}{interval}", *accuracies,
                f"{table.chains.tokens:.0f}", f"{table.chains.ended:.0%}", f"{table.chains.ratio:.2f}",
                f"{cost['reads'] / 1e3:.1f}", f"{cost['peak_tokens']:.0f}", f"{cost['peak_bytes'] / 2**20:.2f}",
                f"{1e3 * cost['seconds']:.3g}",
            ]
        )  # fmt: skip
    head = ["task", "method", "problems", f"W = {widths[0]}", *(f"W = {w}" for w in widths[1:]), "tokens", "ended"]
    return Section(
        title="What a ratio costs a chain",
        text=f"At the largest L, {max(study.lengths)} tokens. Ratio: tokens seen over tokens held at the end of a "
        "chain, measured. Reads, peak and milliseconds are of one chain.",
        head=[*head, "ratio", "reads, K", "peak tokens", "peak MiB", "ms"],
        rows=rows,
    )


def _best(study: Study, made: Sequence[Table], task: str, budget: str) -> Section:
    """Rows: doublings of the budget from the cheapest point on; columns: methods."""
    unit = SHOWN[budget][0]
    fronts = {method: front_of(study, own, budget) for method, own in _methods(made, task).items()}
    costs = [point.cost for points in fronts.values() for point in points]
    rows = []
    if costs:
        low, high = min(costs), max(costs)
        for step in range(int(np.ceil(np.log2(high / low))) + 1):
            limit = min(low * 2.0**step, high)
            affordable = {m: [p for p in points if p.cost <= limit] for m, points in fronts.items()}
            rows.append([f"{limit / unit:.3g}", *(str(p[-1]) if p else "-" for p in affordable.values())])
    return Section(
        title=f"Best on {task} at each budget of {BUDGETS[budget]}",
        detail=True,
        text="W-L and the method at its ratio: right answers.",
        head=[SHOWN[budget][1], *fronts],
        rows=rows,
    )
