"""One resumable runner for grids of runs: cells by name, each made once and written whole as JSON lines.

Several processes may work on one file, each on cells of its own (`only`): a cell is appended by one write.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_lines(results: Path) -> list[Line]:
    """What a results file holds. Raises ValueError where it is none."""
    try:
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot read {results}: {error.strerror}") from None
    except json.JSONDecodeError:
        raise ValueError(f"{results} is no file of JSON lines") from None


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


def append(results: Path, lines: Sequence[Line]) -> None:
    """Write a cell's lines at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def run_cells(
    cells: Mapping[str, Callable[[], Sequence[Line]]],
    results: Path,
    *,
    only: Sequence[str] | None = None,
    seconds: float = float("inf"),
    say: Say = to_stderr,
) -> None:
    """Make the cells that the results lack; each line gets the cell's name and seconds. Raises ValueError as missing
    does, and what a cell raises: what was made before is kept."""
    for name in missing(list(cells), results, key="cell", only=only, seconds=seconds, say=say):
        say(f"== {name}")
        started = time.monotonic()
        lines = cells[name]()
        spent = round(time.monotonic() - started, 1)
        append(results, [{"cell": name, "cell_seconds": spent, **line} for line in lines])
