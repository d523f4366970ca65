"""python -m sparsekv.studies.comparison run OUT [--processes 8]    OUT/comparison.jsonl, a line a measured thing
python -m sparsekv.studies.comparison cells                          the names of the cells
python -m sparsekv.studies.comparison report RESULTS.jsonl PAGE.md"""

import argparse
import sys
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sparsekv.studies.comparison.cells import grouped_cells
from sparsekv.studies.comparison.report import write_page
from sparsekv.studies.runner import failures_of, run_cells

STUDY = "studies/comparison.yaml"
RESULTS = "comparison.jsonl"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake, 1 where cells failed."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_page(options.results, options.page)
            return 0
        if options.command == "cells":
            print("\n".join(name for group in grouped_cells(options.study, shared=Path()) for name in group))
            return 0
        failed = _run(options)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if failed:
        where = failures_of(options.out / RESULTS)
        print(f"Failed: {', '.join(failed)}; {where} says why, the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def _run(options: argparse.Namespace) -> list[str]:
    """Returns the cells that failed. Raises ValueError for a study or a cell that is not there."""
    disable_progress_bar()
    only = [name.strip() for name in options.only.split(",")] if options.only else None
    with tempfile.TemporaryDirectory() as shared:
        groups = grouped_cells(options.study, shared=Path(shared))
        names = [name for group in groups for name in group]
        unknown = sorted(set(only or ()) - set(names))
        if unknown:
            raise ValueError(f"unknown cells {', '.join(unknown)}; the study has {', '.join(names)}")
        options.out.mkdir(parents=True, exist_ok=True)
        return run_cells(
            [{name: cell for name, cell in cells.items() if only is None or name in only} for cells in groups],
            options.out / RESULTS,
            seconds=options.seconds,
            processes=options.processes,
            about={"commit": options.commit} if options.commit else None,
        )


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
