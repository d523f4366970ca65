"""docs/comparison.md from a results file: tables for each question and one picture, between its markers."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsekv.json_lines import Line, read_lines
from sparsekv.markdown import replaced
from sparsekv.studies.comparison import tables
from sparsekv.studies.comparison.results import DENSE, Results, in_order, right, score, text_of
from sparsekv.studies.pictures import Curve, Panel, draw

BLOCK = "comparison"
HIGHEST = 0.5
"""Above it a rise of perplexity is left out of the picture, not of the tables: it would flatten all others."""


def write_page(file: Path, page: Path) -> None:
    """Rewrite the block between the markers of `page`, and the picture beside it.

    Raises ValueError for files that are not there, results that are not such or lack dense, or a page without its
    markers.
    """
    lines = read_lines(file)
    replaced(page, "", name=BLOCK)  # refuses the page before anything is drawn
    if not any(line.get("method") == DENSE and line["kind"] == "quality" for line in lines):
        raise ValueError(f"{file} has no results of dense, which all others are compared with; make the cell `dense`")
    results = Results(lines=[line for line in lines if line["kind"] == "quality"])
    speed = [line for line in lines if line["kind"] == "speed"]
    picture = page.parent / "img" / "comparison.png"
    draw(_panels(results), picture)
    link = f"![What each method costs, by ratio]({Path(os.path.relpath(picture, page.parent)).as_posix()})"
    parts = [_origin(lines), link, *_sections(results), *_speed(speed)]
    page.write_text(replaced(page, "\n\n".join(parts), name=BLOCK), encoding="utf-8")


def _origin(lines: Sequence[Line]) -> str:
    def listed(key: str) -> str:
        return ", ".join(sorted({str(line[key]) for line in lines}))

    return (
        f"{listed('model')}, {listed('hardware')}, torch {listed('torch')}, commit {listed('commit')}, "
        f"seed {listed('seed')}."
    )


def _sections(results: Results) -> list[str]:
    parts = []
    for ratio in results.ratios:
        parts += [f"## Ratio {ratio:g}", tables.quality(results, ratio)]
    if results.kinds:
        parts.append("## By length of the text and depth of the fact")
        for ratio in results.ratios:
            parts += [f"Ratio {ratio:g}:", tables.lengths(results, ratio), tables.depths(results, ratio)]
    shares = tables.shares(results)
    return parts + (["## How little DMS + Quest may read", shares] if shares else [])


def _speed(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    first = next((line for line in lines if line["cr"]), lines[0])
    about = f"Prompts of {first['prompt']} tokens and {first['output']} after them, at ratio {first['cr']:g}:"
    return ["## Speed in the engine", about, tables.speed(lines)]


def _panels(results: Results) -> list[Panel]:
    panels = []
    if results.measures_text:
        panels.append(_panel(results, "perplexity over dense", level=0.0, value=_rise))
    if results.kinds:
        dense = right(results.of(DENSE, None))
        assert dense is not None
        panels.append(_panel(results, "right answers, mean over tasks", level=dense.value, value=_right))
    return panels


def _rise(lines: Sequence[Line]) -> float | None:
    line = text_of(lines)
    rise = None if line is None else score(line, "rise").value
    return None if rise is None or rise > HIGHEST else rise


def _right(lines: Sequence[Line]) -> float | None:
    found = right(lines)
    return None if found is None else found.value


def _panel(results: Results, label: str, *, level: float, value: Callable[[Sequence[Line]], float | None]) -> Panel:
    methods = sorted({method for ratio in results.ratios for method in results.methods(ratio)[1:]}, key=in_order)
    curves = [
        Curve(
            name=method,
            x=results.ratios,
            y=[value(results.of(method, ratio)) for ratio in results.ratios],
            bold=method == "dms",
        )
        for method in methods
    ]
    return Panel(title="", xlabel="ratio asked for", ylabel=label, curves=curves, percent_y=True, level=level)
