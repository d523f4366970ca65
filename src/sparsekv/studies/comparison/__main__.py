"""python -m sparsekv.studies.comparison run OUT [--only a,b]    OUT/comparison.jsonl, a line a measured thing
python -m sparsekv.studies.comparison cells                       the names of the cells
python -m sparsekv.studies.comparison report RESULTS.jsonl PAGE.md"""

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sparsekv.studies.comparison.cells import cells_of
from sparsekv.studies.comparison.report import write_page
from sparsekv.studies.comparison.study import load_study
from sparsekv.studies.runner import run_cells

STUDY = "studies/comparison.yaml"
RESULTS = "comparison.jsonl"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_page(options.results, options.page)
            return 0
        cells = cells_of(load_study(options.study))
        if options.command == "cells":
            print("\n".join(cells))
            return 0
        disable_progress_bar()
        only = [name.strip() for name in options.only.split(",")] if options.only else None
        run_cells(cells, options.out / RESULTS, only=only, seconds=options.seconds)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsekv.studies.comparison", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--study", type=Path, default=STUDY, help=f"what is compared, as YAML ({STUDY})")
    run = commands.add_parser("run", parents=[shared], help="make the cells that OUT lacks")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--only", help="names of cells, with commas between; several processes may share OUT so")
    run.add_argument("--seconds", type=float, default=float("inf"), help="no further cell is begun after this time")
    commands.add_parser("cells", parents=[shared], help="list the cells")
    report = commands.add_parser("report", help="tables and pictures of the results")
    report.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    report.add_argument("page", type=Path, metavar="PAGE.md")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
