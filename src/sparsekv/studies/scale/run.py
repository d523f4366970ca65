"""Draw what a study lacks, cell by cell; whatever stops it, the batches that were drawn stay."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import yaml

from sparsekv.json_lines import Line
from sparsekv.modeling.adapter import read_adapter
from sparsekv.studies.runner import Say, to_stderr
from sparsekv.studies.scale.cells import Cell, chosen
from sparsekv.studies.scale.draw import draw, wanted
from sparsekv.studies.scale.draws import Draws, check
from sparsekv.studies.scale.engines import Engines
from sparsekv.studies.scale.study import Study

RESOLVED = "study.yaml"


def run(
    study: Study,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    seconds: float = float("inf"),
    say: Say = to_stderr,
) -> bool:
    """Draw the cells (those that `only` names) that `out` lacks, and leave those to it that another process draws.
    Returns whether all of them are there now; False where the seconds were over first: no batch is begun that would end
    later, by what the last one took.

    Raises ValueError for draws of another study, and as `draw` does.
    """
    cells = prepare(study, out, only=only)
    clock = _Clock(seconds)
    others: list[Draws] = []
    with closing(Engines(study)) as engines:
        for number, cell in enumerate(cells):
            draws = Draws.of(out, cell)
            with draws.claimed() as mine:
                if not mine:
                    say(f"== {cell.name} is being drawn by another process")
                    others.append(draws)
                    continue
                say(f"== {cell.name} ({number + 1} of {len(cells)})")
                for lines in draw(study, cell, draws.read(), engines):
                    draws.add(lines)
                    if "problem" in lines[0]:
                        say(f"   {len(lines)} problems, {_right(lines):.0%} of chains right, {clock.lap():.1f} s")
                    if clock.over and not complete(study, draws):
                        say(f"The {seconds:g} seconds are over; the same command goes on from here")
                        return False
    return all(complete(study, draws) for draws in others)


def prepare(study: Study, out: Path, *, only: Sequence[str] | None) -> list[Cell]:
    """The cells to draw, with the study saved beside them. Raises ValueError before anything is drawn for draws of
    another study, tasks without so many problems, and heads that are not there."""
    cells = lacking(study, out, only=only)
    check_adapters(cells)
    assert not cells or study.problem_lists
    out.mkdir(parents=True, exist_ok=True)
    (out / RESOLVED).write_text(yaml.safe_dump(study.to_dict(), sort_keys=False), encoding="utf-8")
    return cells


def lacking(study: Study, out: Path, *, only: Sequence[str] | None) -> list[Cell]:
    """The cells that `out` does not hold whole, in order. Raises ValueError for draws of another study."""
    cells = list(study.cells())
    for cell in cells:
        header, _ = Draws.of(out, cell).read()
        if header is not None:
            check(header, wanted(study, cell), out=out)
    return [cell for cell in chosen(cells, only) if not complete(study, Draws.of(out, cell))]


def check_adapters(cells: Sequence[Cell]) -> None:
    """Raises ValueError for heads that are not there, or do not reach a ratio, before anything is drawn."""
    for adapter, ratio in dict.fromkeys(
        (c.method.adapter, c.ratio) for c in cells if c.method.policy.startswith("dms")
    ):
        if adapter is not None:
            read_adapter(adapter)[0].offset_for(ratio)


def complete(study: Study, draws: Draws) -> bool:
    """Whether a file has all the study's problems."""
    have = {line["problem"] for line in draws.read()[1]}
    # the count suffices where the task is not made yet: its first problems are always the same
    return len(have) >= study.problems


class _Clock:
    """Tells when another lap like the last would end too late."""

    def __init__(self, seconds: float) -> None:
        self._last = time.monotonic()
        self._deadline = self._last + seconds
        self._took = 0.0

    def lap(self) -> float:
        now = time.monotonic()
        self._took, self._last = now - self._last, now
        return self._took

    @property
    def over(self) -> bool:
        return time.monotonic() + self._took > self._deadline


def _right(lines: Sequence[Line]) -> float:
    flat = [right for line in lines for right in line["right"]]
    return sum(flat) / len(flat)
