"""python -m sparsekv.studies.comparison run OUT [--processes 8]    OUT/comparison.jsonl, a line a measured thing
python -m sparsekv.studies.comparison cells                          the names of the cells
python -m sparsekv.studies.comparison report RESULTS.jsonl PAGE.md"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from sparsekv.studies.comparison.cells import quality_cells, speed_cells
from sparsekv.studies.comparison.report import write_page
from sparsekv.studies.runner import run_cells

STUDY = "studies/comparison.yaml"
RESULTS, LOCK = "comparison.jsonl", ".clock"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_page(options.results, options.page)
            return 0
        lock = Path() if options.command == "cells" else options.out / LOCK
        quality, speed = quality_cells(options.study), speed_cells(options.study, lock=lock)
        if options.command == "cells":
            print("\n".join([*quality, *speed]))
            return 0
        _run(quality, speed, options)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(quality: dict[str, Any], speed: dict[str, Any], options: argparse.Namespace) -> None:
    """Speed last, when nothing else runs. Raises ValueError as run_cells does."""
    disable_progress_bar()
    only = [name.strip() for name in options.only.split(",")] if options.only else None
    unknown = sorted(set(only or ()) - {*quality, *speed})
    if unknown:
        raise ValueError(f"unknown cells {', '.join(unknown)}; the study has {', '.join([*quality, *speed])}")
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for cells in (quality, speed):
        run_cells(
            {name: cell for name, cell in cells.items() if only is None or name in only},
            options.out / RESULTS,
            seconds=options.seconds - (time.monotonic() - begun),
            processes=options.processes,
            about={"commit": options.commit} if options.commit else None,
        )
    (options.out / LOCK).unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsekv.studies.comparison", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--study", type=Path, default=Path(STUDY), help=f"what is compared, as YAML ({STUDY})")
    run = commands.add_parser("run", parents=[shared], help="make the cells that OUT lacks")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--only", help="names of cells, with commas between")
    run.add_argument("--processes", type=int, default=1, help="that share the machine (1)")
    run.add_argument("--seconds", type=float, default=float("inf"), help="no further cell is begun after this time")
    run.add_argument("--commit", help="written to each line, where the code is no checkout; default: what git says")
    commands.add_parser("cells", parents=[shared], help="list the cells")
    report = commands.add_parser("report", help="tables and pictures of the results")
    report.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    report.add_argument("page", type=Path, metavar="PAGE.md")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
