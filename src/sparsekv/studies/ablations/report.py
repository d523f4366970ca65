"""docs/ablations.md from a results file: for each question of the study a table and a picture, between its markers.

Perplexity is shown over dense, on the training's domain and as the mean over the others; retrieval as the share of what
dense gets right that stays right; each at the ratio that was measured.
"""

import os
from pathlib import Path

from sparsekv.evals.perplexity import rise_of
from sparsekv.json_lines import Line, read_lines
from sparsekv.markdown import replaced, table
from sparsekv.studies.ablations.study import Picture, Study

BLOCK = "ablations"
HEAD = ("run", "point", "ratio", "perplexity", "other domains", "divergence", "retrieval kept")


def write_page(results: Path, page: Path, *, study: Study, images: Path | None = None) -> None:
    """Rewrite the block between the markers of `page`, and the pictures beside it.

    Raises ValueError for files that are not there, results that are not such, or a page without its markers.
    """
    images = page.parent / "img" if images is None else images
    lines = read_lines(results)
    replaced(page, "", name=BLOCK)  # refuses the page before anything is drawn
    images.mkdir(parents=True, exist_ok=True)
    there = {line["run"] for line in lines}
    absent = [name for name in study.runs if name not in there]
    parts = [_origin(lines)] + [f"Not in these results: {', '.join(absent)}."] * bool(absent)
    for picture in study.pictures:
        shown = [line for name in picture.runs for line in lines if line["run"] == name]
        if len(there.intersection(picture.runs)) < 2:  # nothing to compare
            continue
        target = images / f"ablations-{picture.name}.png"
        draw(picture, shown, target)
        link = f"![{picture.title}]({Path(os.path.relpath(target, page.parent)).as_posix()})"
        parts += [f"## {picture.title}", link, table(HEAD, [_row(line) for line in shown])]
    page.write_text(replaced(page, "\n\n".join(parts), name=BLOCK), encoding="utf-8")


def draw(picture: Picture, lines: list[Line], target: Path) -> None:
    """Measured ratio against the rise of perplexity and against retrieval, a colour for each run; the heads as training
    left them as crosses."""
    from matplotlib.figure import Figure  # no pyplot: it would pick a window system
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, name in enumerate(picture.runs):
        mine = [line for line in lines if line["run"] == name]
        dialled = sorted((line for line in mine if line["point"] == "dialled"), key=lambda line: line["ratio"])
        ratios, colour = [line["ratio"] for line in dialled], f"C{index}"
        left.plot(ratios, [rise_of(line) for line in dialled], "o-", color=colour, label=name)
        left.plot(ratios, [other_rise(line) for line in dialled], "o:", color=colour, markersize=3)
        right.plot(ratios, [kept(line) for line in dialled], "o-", color=colour, label=name)
        for end in (line for line in mine if line["point"] == "end"):
            left.plot(end["ratio"], rise_of(end), "x", color=colour)
            right.plot(end["ratio"], kept(end), "x", color=colour)
    left.set_ylabel("perplexity over dense (dotted: other domains)")
    right.set_ylabel("retrieval kept, of what dense gets right")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("measured ratio")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.suptitle(picture.title)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def other_rise(line: Line) -> float:
    """Mean over the other domains; NaN without any."""
    found = [rise_of(text) for text in line["others"].values()]
    return sum(found) / len(found) if found else float("nan")


def kept(line: Line) -> float:
    """Mean over the kinds of retrieval that dense can do; NaN without any."""
    found = [cell["kept"] for cell in line["retrieval"].values() if cell["kept"] is not None]
    return sum(found) / len(found) if found else float("nan")


def _row(line: Line) -> tuple[str, ...]:
    others = ", ".join(f"{rise_of(text):+.2%}" for text in line["others"].values())
    cells = [f"{kind} {cell['kept']:.0%}" for kind, cell in line["retrieval"].items() if cell["kept"] is not None]
    point = "end of training" if line["point"] == "end" else f"dialled to {line['asked']:g}"
    figures = (f"{line['ratio']:.2f}", f"{rise_of(line):+.2%}", others, f"{line['divergence']:.4f}", ", ".join(cells))
    return (line["run"], point, *figures)


def _origin(lines: list[Line]) -> str:
    def listed(key: str) -> str:
        return ", ".join(sorted({str(line[key]) for line in lines}))

    return f"{listed('hardware')}, torch {listed('torch')}, commit {listed('commit')}, {listed('date')}."
