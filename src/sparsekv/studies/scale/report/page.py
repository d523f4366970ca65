"""A study's results out of its draws: results.jsonl, margins.jsonl, pictures and one HTML page without network; and the
block of a Markdown page between its markers."""

import base64
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from sparsekv.markdown import replaced, table
from sparsekv.studies.scale.cells import BUDGETS
from sparsekv.studies.scale.report.margins import compare
from sparsekv.studies.scale.report.sections import Section, front_of, sections
from sparsekv.studies.scale.report.tables import Table, result_lines, tables
from sparsekv.studies.scale.study import Study

BLOCK = "hyperscaling"
PAGE, RESULTS, MARGINS, FRONTS, PICTURES = "report.html", "results.jsonl", "margins.jsonl", "fronts.json", "img"


def report(study: Study, out: Path, *, markdown: Path | None = None) -> dict[str, Any]:
    """Write the report of what `out` holds into it; markdown: a page whose block is rewritten, with its pictures in an
    `img` folder beside it. Returns {"page", "results", "margins"}: the files' paths and what they hold.

    Raises ValueError where nothing was drawn, or the page lacks its markers.
    """
    if markdown is not None:
        check_page(markdown)
    made = tables(study, out)
    if not made:
        raise ValueError(f"{out} holds no draws of this study; run it first")
    results, compared = result_lines(study, made), compare(made)
    _write_lines(out / RESULTS, results)
    _write_lines(out / MARGINS, [each.to_dict() for each in compared])
    (out / FRONTS).write_text(json.dumps(_fronts(study, made), indent=1), encoding="utf-8")
    parts, origin = sections(study, made, compared, out / PICTURES), _origin(study, made)
    page = out / PAGE
    page.write_text(_html(parts, title="Inference-time hyper-scaling", origin=origin), encoding="utf-8")
    if markdown is not None:
        block = _markdown(parts, markdown, origin=origin)
        markdown.write_text(replaced(markdown, block, name=BLOCK), encoding="utf-8")
    return {"page": str(page), "results": results, "margins": [each.to_dict() for each in compared]}


def check_page(page: Path) -> None:
    """Raises ValueError unless it has its markers."""
    replaced(page, "", name=BLOCK)


def _fronts(study: Study, made: Sequence[Table]) -> list[dict[str, Any]]:
    """Each method's front on each task, with the configuration of each point."""
    found = []
    for task in dict.fromkeys(t.cell.task for t in made):
        own = [t for t in made if t.cell.task == task]
        for method in dict.fromkeys(t.cell.method.name for t in own):
            for budget in BUDGETS:
                points = front_of(study, [t for t in own if t.cell.method.name == method], budget)
                found.append(
                    {"task": task, "method": method, "budget": budget, "points": [vars(point) for point in points]}
                )
    return found


def _origin(study: Study, made: Sequence[Table]) -> str:
    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(t.about[name]) for t in made))

    problems = sorted({len(t.problems) for t in made})
    count = str(problems[0]) if len(problems) == 1 else f"{problems[0]} to {problems[-1]}"
    return (
        f"{listed('model')}: {count} {study.split} problems a task, {study.width} chains of each of at most "
        f"{study.most_tokens} tokens, temperature {study.temperature:g}, seeds {', '.join(map(str, study.seeds))}; "
        f"{listed('hardware')}, torch {listed('torch')}, commit {listed('commit')}, pool "
        f"{study.kv_memory or 'automatic'}, {study.rows} rows. One draw serves every W (subsets of its chains) and "
        "every L (a longer chain has no answer)."
    )


def _html(parts: Sequence[Section], *, title: str, origin: str) -> str:
    template = Template(files("sparsekv.studies.scale.report").joinpath("page.html").read_text(encoding="utf-8"))
    body = "\n".join(map(_html_section, parts))
    return template.substitute(title=html.escape(title), origin=html.escape(origin), body=body)


def _html_section(part: Section) -> str:
    out = [f"<h2>{html.escape(part.title)}</h2>", f"<p>{html.escape(part.text)}</p>"]
    if part.picture is not None:
        data = base64.b64encode(part.picture.read_bytes()).decode()
        out.append(f'<div class="wide"><img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}"></div>')
    if part.head:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.head)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in part.rows)
        out.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    return "\n".join(out)


def _markdown(parts: Sequence[Section], page: Path, *, origin: str) -> str:
    out = [origin]
    for part in (each for each in parts if not each.detail):
        out += [f"## {part.title}", part.text]
        if part.picture is not None:
            copy = page.parent / "img" / f"{page.stem}-{part.picture.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(part.picture.read_bytes())
            out.append(f"![{part.title}]({Path(os.path.relpath(copy, page.parent)).as_posix()})")
        if part.head:
            out.append(table(part.head, part.rows))
    return "\n\n".join(text for text in out if text)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
