"""docs/comparison.md from a results file: a table for each question and one picture, between its markers.

What is compared stands once in each row; dense is the first line of a table. Random is in every one.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsekv.markdown import replaced, table
from sparsekv.studies.pictures import Curve, Panel, draw
from sparsekv.studies.runner import Line, read_lines

BLOCK = "comparison"


def write_page(results: Path, page: Path) -> None:
    """Rewrite the block between the markers of `page`, and the picture beside it.

    Raises ValueError for files that are not there, results that are not such, or a page without its markers.
    """
    lines = read_lines(results)
    if not page.exists():
        raise ValueError(f"there is no page {page}; give one with the lines that begin and end the block {BLOCK}")
    replaced(page, "", name=BLOCK)  # refuses the page before anything is drawn
    picture = page.parent / "img" / "comparison.png"
    quality = [line for line in lines if line["kind"] == "quality"]
    draw(_panels(quality), picture)
    link = f"![What each method costs, by ratio]({Path(os.path.relpath(picture, page.parent)).as_posix()})"
    parts = [_origin(lines), link, *_quality_tables(quality)]
    speed = [line for line in lines if line["kind"] == "speed"]
    if speed:
        parts += ["## Speed in the engine", _speed_table(speed)]
    page.write_text(replaced(page, "\n\n".join(parts), name=BLOCK), encoding="utf-8")


def _origin(lines: Sequence[Line]) -> str:
    def listed(key: str) -> str:
        return ", ".join(sorted({str(line[key]) for line in lines}))

    return (
        f"{listed('model')}, {listed('hardware')}, torch {listed('torch')}, commit {listed('commit')}, "
        f"seed {listed('seed')}."
    )


def _name(line: Line) -> str:
    return "dense" if line["policy"] == "dense" else f"{line['policy']} at {line['cr']:g}"


def _tasks(lines: Sequence[Line]) -> list[tuple[str, int]]:
    """(task, length), in the order of the results."""
    return list(dict.fromkeys((line["task"], line["length"]) for line in lines))


def _score(line: Line, dense: Line) -> float:
    """Perplexity over dense; else the share of right answers."""
    if line["task"] == "perplexity":
        return line["scores"]["perplexity"]["value"] / dense["scores"]["perplexity"]["value"] - 1
    return line["scores"]["accuracy"]["value"]


def _shown(line: Line, dense: Line) -> str:
    if line["task"] != "perplexity":
        score = line["scores"]["accuracy"]
        return f"{score['value']:.0%} ({score['low']:.0%} to {score['high']:.0%})"
    if line is dense:
        return f"{line['scores']['perplexity']['value']:.2f}"
    return f"{_score(line, dense):+.1%}"


def _quality_tables(lines: Sequence[Line]) -> list[str]:
    """One for each ratio: methods down, tasks across, and what was held and read on the running text."""
    tasks, out = _tasks(lines), []
    dense = {(line["task"], line["length"]): line for line in lines if line["policy"] == "dense"}
    heads = ["perplexity" if task == "perplexity" else f"{task}, {length}" for task, length in tasks]
    for ratio in sorted({line["cr"] for line in lines if line["cr"]}):
        rows = []
        names = dict.fromkeys(line["policy"] for line in lines if line["policy"] == "dense" or line["cr"] == ratio)
        for policy in names:
            mine = {(x["task"], x["length"]): x for x in lines if x["policy"] == policy and x["cr"] in (None, ratio)}
            first = mine[tasks[0]]
            reads = "" if first["kv_reads"] is None else f"{first['kv_reads'] / first['output_tokens']:.0f}"
            held = [f"{first['ratio']:.2f}", f"{first['tokens_held']:.0f}", f"{first['peak_tokens']:.0f}", reads]
            cells = [_shown(mine[task], dense[task]) if task in mine else "" for task in tasks]
            rows.append([policy, *held, *cells])
        title = f"## Ratio {ratio:g}"
        out += [title, table(["method", "measured ratio", "held", "peak", "read a step", *heads], rows)]
    return out


def _panels(lines: Sequence[Line]) -> list[Panel]:
    tasks = _tasks(lines)
    dense = {(line["task"], line["length"]): line for line in lines if line["policy"] == "dense"}
    text = [task for task in tasks if task[0] == "perplexity"]
    answers = [task for task in tasks if task[0] != "perplexity"]
    panels = []
    if text:
        panels.append(_panel(lines, text, dense, "perplexity over dense", level=0.0))
    if answers:
        right = sum(_score(dense[task], dense[task]) for task in answers) / len(answers)
        panels.append(_panel(lines, answers, dense, "right answers, mean over tasks", level=right))
    return panels


def _panel(
    lines: Sequence[Line], tasks: Sequence[tuple[str, int]], dense: dict[Any, Line], label: str, *, level: float
) -> Panel:
    curves = []
    ratios = sorted({line["cr"] for line in lines if line["cr"]})
    for policy in dict.fromkeys(line["policy"] for line in lines if line["policy"] != "dense"):

        def mean(ratio: float, policy: str = policy) -> float | None:
            mine = [x for x in lines if (x["policy"], x["cr"]) == (policy, ratio) and (x["task"], x["length"]) in tasks]
            scores = [_score(line, dense[line["task"], line["length"]]) for line in mine]
            return sum(scores) / len(scores) if len(scores) == len(tasks) else None

        curves.append(Curve(name=policy, x=ratios, y=[mean(ratio) for ratio in ratios], bold=policy == "dms"))
    limited = _within(curves) if label.startswith("perplexity") else curves
    return Panel(title="", xlabel="ratio asked for", ylabel=label, curves=limited, percent_y=True, level=level)


def _within(curves: list[Curve], most: float = 0.5) -> list[Curve]:
    """Points above 50 % are left out of the picture, not of the tables: they would flatten all others."""
    keep: Callable[[float | None], float | None] = lambda y: y if y is not None and y <= most else None  # noqa: E731
    return [Curve(name=c.name, x=c.x, y=[keep(y) for y in c.y], bold=c.bold) for c in curves]


def _speed_table(lines: Sequence[Line]) -> str:
    batches = sorted({line["batch"] for line in lines})
    head = ["method", "held", "read a step", *(f"tokens/s, batch {batch}" for batch in batches)]
    head += [f"ms a step, batch {batch}" for batch in batches]
    rows = []
    for policy in dict.fromkeys(line["policy"] for line in lines):
        mine = {line["batch"]: line for line in lines if line["policy"] == policy}
        last = mine[batches[-1]]
        reads = f"{last['kv_reads'] / (last['output'] - 1):.0f}"
        speeds = [f"{mine[batch]['tokens_per_second']:,.0f}" for batch in batches]
        rows.append(
            [policy, f"{last['tokens_held']:.0f}", reads, *speeds, *(f"{mine[b]['step_ms']:.2f}" for b in batches)]
        )
    return table(head, rows)
