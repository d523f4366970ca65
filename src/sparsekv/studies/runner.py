"""One resumable runner for grids of runs: cells by name, each made once and written whole as JSON lines.

Cells are made one after another, or spread over processes (workers.py). A cell that fails is written to a file of its
own, the others go on, and the next run tries it again. Several runners may work on one file, each on cells of its own
(`only`): a cell is appended by one write.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sparsekv.json_lines import Line, append, read_lines
from sparsekv.studies.workers import Cell, Crew, Made

Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def missing(
    names: Sequence[str],
    results: Path,
    *,
    key: str,
    only: Sequence[str] | None = None,
    seconds: float = float("inf"),
    say: Say = to_stderr,
) -> Iterator[str]:
    """The names, in order, that no line of the results has under `key`, read anew before each; none after so many
    seconds. Raises ValueError for a name in `only` that is not there."""
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise ValueError(f"unknown {key}s {', '.join(unknown)}; the study has {', '.join(names)}")
    deadline = time.monotonic() + seconds
    for name in names:
        done = {line[key] for line in read_lines(results)} if results.exists() else set()
        if name in done or only is not None and name not in only:
            continue
        if time.monotonic() > deadline:
            say(f"The {seconds:g} seconds are over: {name} and what follows are left out")
            return
        yield name


def run_cells(
    groups: Sequence[Mapping[str, Cell]],
    results: Path,
    *,
    seconds: float = float("inf"),
    processes: int = 1,
    about: Line | None = None,
    say: Say = to_stderr,
) -> list[str]:
    """Make the cells that the results lack, those of a group when the group before it is over; each line gets the
    cell's name and seconds, and what is said `about` all. No cell is begun after so many seconds.

    Returns the names of cells that failed: `failures_of(results)` says why. processes: more than one make cells at
    once, which must be picklable then.
    """
    end, failed = time.monotonic() + seconds, list[str]()
    with Crew(processes) as crew:
        for cells in groups:
            names = list(missing(list(cells), results, key="cell", say=say))
            for made in crew.make({name: cells[name] for name in names}, until=end):
                _keep(made, results, about or {}, say)
                failed += [made.name] if made.error else []
                names.remove(made.name)
            if names:
                say(f"The {seconds:g} seconds are over, left out: {', '.join(names)}")
    return failed


def failures_of(results: Path) -> Path:
    """Where the cells that failed are told, with their tracebacks."""
    return results.with_suffix(".failed.jsonl")


def _keep(made: Made, results: Path, about: Line, say: Say) -> None:
    cell = {"cell": made.name, "cell_seconds": made.seconds}
    if made.error:
        append(failures_of(results), [{**cell, "error": made.error, "traceback": made.traceback, **about}])
        say(f"== {made.name} failed after {made.seconds:g} s: {made.error}")
        return
    append(results, [{**cell, **line, **about} for line in made.lines])
    say(f"== {made.name}: {made.seconds:g} s")
