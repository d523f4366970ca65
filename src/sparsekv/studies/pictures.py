"""Pictures in the demo's style: few colours, a faint grid, names at the ends of their lines instead of a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

INK, SOFT, GRID = "#1c1b19", "#6b6862", "#e3e0da"
SHADES = ("#1c1b19", "#7a3410", "#b85c12", "#d98a1c", "#e0b45c")
"""Dense, then ratio by ratio."""
COLOURS = ("#b85c12", "#1f5f8b", "#4c7a34", "#7b3f8c", "#a33b3b", "#2f8f83", "#8a6d1d", "#6b6862", "#1c1b19", "#c2478a")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A named line; points of no value (None) are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    log_x: bool = True
    percent_y: bool = False
    level: float | None = None
    """A horizontal line, such as dense's."""


def draw(panels: Sequence[Panel], file: Path) -> None:
    """The panels, two in a row, as PNG of few colours: a quarter of the size."""
    from matplotlib.figure import Figure  # no pyplot: it would pick a window system
    from PIL import Image

    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(5.4 * columns, 4.2 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for each, panel in zip(axes, panels, strict=False):
        _panel(each, panel)
    for empty in axes[len(panels) :]:
        empty.set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = BytesIO()
    figure.savefig(whole)
    Image.open(whole).convert("RGB").quantize(64).save(file, optimize=True)


def name_end(axes: Any, point: tuple[float, float], name: str, colour: str, *, bold: bool = True) -> None:
    """A line's name beside its last point."""
    axes.annotate(
        name, point, xytext=(7, 0), textcoords="offset points", va="center", color=colour, fontsize=9,
        fontweight="bold" if bold else "normal", annotation_clip=False,
    )  # fmt: skip


def plain(axes: Any) -> None:
    """A faint grid, one spine, no ticks. Call it when the axes have their labels."""
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, colors=SOFT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)


def _panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

    ends = []
    for index, curve in enumerate(panel.curves):
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        if not points:
            continue
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2.6 if curve.bold else 1.4, markersize=4)
        ends.append((points[-1][1], points[-1][0], curve.name, colour, curve.bold))
    if panel.level is not None:
        axes.axhline(panel.level, color=SOFT, linewidth=1, linestyle=":")
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.percent_y:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _names(axes, ends)
    axes.set_title(panel.title, color=INK, fontsize=10, loc="left")
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    plain(axes)


def _names(axes: Any, ends: list[tuple[float, float, str, str, bool]]) -> None:
    """Beside the last points; where two would touch, the one nearer to the middle gives way."""
    low, high = axes.get_ylim()
    middle, apart = (low + high) / 2, (high - low) / 18
    placed: list[tuple[float, float]] = []
    for y, x, name, colour, bold in sorted(ends, key=lambda end: -abs(end[0] - middle)):
        at = y
        while any(abs(at - other) < apart and _near(axes, x, beside) for other, beside in placed):
            at += apart if y < middle else -apart
        placed.append((at, x))
        name_end(axes, (x, at), name, colour, bold=bold)


def _near(axes: Any, a: float, b: float) -> bool:
    """Whether two points are within a sixth of the width of each other."""
    left, right = (axes.transData.transform((x, 0))[0] for x in (a, b))
    return abs(left - right) < axes.bbox.width / 6
