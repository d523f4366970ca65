"""A study on many GPUs and machines by Ray: cells that share an engine are one task, and each batch comes back as it is
drawn, so that what a lost machine had drawn stays. Models and adapters lie where every machine finds them.

Needs `ray`, and a cluster whose address is given ("auto": that of this machine).
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sparsekv.json_lines import Line
from sparsekv.studies.runner import Say, to_stderr
from sparsekv.studies.scale.cells import Cell
from sparsekv.studies.scale.draw import draw
from sparsekv.studies.scale.draws import Draws
from sparsekv.studies.scale.engines import Engines
from sparsekv.studies.scale.run import prepare
from sparsekv.studies.scale.study import Study


def run_on_ray(
    study: Study,
    out: Path,
    *,
    address: str,
    only: Sequence[str] | None = None,
    gpus: float = 1,
    say: Say = to_stderr,
) -> None:
    """As run, with `gpus` for each task. Raises ValueError without Ray, as run does, and what a task raised."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'sparsekv[cluster]'") from None
    cells = prepare(study, out, only=only)
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, None if cell.method.policy == "dms" else cell.ratio), []).append(cell)
    try:
        ray.init(address=address, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    remote: Any = ray.remote(num_gpus=gpus)(_draw_group)
    waiting = {}
    for group in groups.values():
        done = [Draws.of(out, cell).read() for cell in group]
        waiting[remote.options(num_returns="streaming").remote(study, group, done)] = None
    while waiting:
        (stream,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            cell, lines = ray.get(next(stream))
        except StopIteration:
            del waiting[stream]
            continue
        Draws.of(out, cell).add(lines)
        say(f"== {cell.name}: {len(lines)} lines")


def _draw_group(
    study: Study, cells: list[Cell], done: list[tuple[Line | None, list[Line]]]
) -> Iterator[tuple[Cell, list[Line]]]:
    with closing(Engines(study)) as engines:
        for cell, have in zip(cells, done, strict=True):
            for lines in draw(study, cell, have, engines):
                yield cell, lines
