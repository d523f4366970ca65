"""One resumable runner for grids of runs: cells by name, each made once and written whole as JSON lines.

Cells are made one after another, or spread over processes that the runner starts (each begins anew, by spawn). Several
runners may work on one file, each on cells of its own (`only`): a cell is appended by one write.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

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
    processes: int = 1,
    about: Line | None = None,
    say: Say = to_stderr,
) -> None:
    """Make the cells that the results lack; each line gets the cell's name and seconds, and what is said `about` all.

    processes: more than one make cells at once, which must be picklable then. Raises ValueError as missing does, and
    what a cell raises, with several processes once the others are made: what was made is kept.
    """
    names = missing(list(cells), results, key="cell", only=only, seconds=seconds, say=say)
    made = map(partial(_make, cells), names) if processes == 1 else _spread(cells, list(names), processes, seconds, say)
    for name, spent, lines in made:
        say(f"== {name}: {spent:g} s")
        append(results, [{"cell": name, "cell_seconds": spent, **line, **(about or {})} for line in lines])


_Made = tuple[str, float, Sequence[Line]]


def _make(cells: Mapping[str, Callable[[], Sequence[Line]]], name: str) -> _Made:
    started = time.monotonic()
    lines = cells[name]()
    return name, round(time.monotonic() - started, 1), lines


def _make_until(end: float, cells: Mapping[str, Callable[[], Sequence[Line]]], name: str) -> _Made | None:
    """None after `end`, seconds since the epoch, which all processes read alike."""
    return None if time.time() > end else _make(cells, name)


def _spread(
    cells: Mapping[str, Callable[[], Sequence[Line]]], names: Sequence[str], processes: int, seconds: float, say: Say
) -> Iterator[_Made]:
    """As they are made; those not begun after so many seconds are left out."""
    workers = min(processes, len(names))
    if not workers:
        return
    spawn, end, failed = multiprocessing.get_context("spawn"), time.time() + seconds, None
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker, initargs=(threads,)) as pool:
        futures = {pool.submit(_make_until, end, {name: cells[name]}, name): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            error = future.exception()
            if error is not None:
                say(f"== {name} failed: {error}")
                failed = failed or error
            elif (made := future.result()) is None:
                say(f"The {seconds:g} seconds are over: {name} is left out")
            else:
                yield made
    if failed is not None:
        raise failed


def _begin_worker(threads: int) -> None:
    import torch

    disable_progress_bar()
    torch.set_num_threads(threads)
