"""python -m sparsekv.studies.ablations run OUT [--only a,b]    OUT/ablations.jsonl, one line a run and ratio
python -m sparsekv.studies.ablations report RESULTS.jsonl PAGE.md [--images FOLDER]"""

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sparsekv.studies.ablations.report import write_page
from sparsekv.studies.ablations.runs import perform
from sparsekv.studies.ablations.study import load_study

STUDY = "configs/ablations.yaml"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_page(options.results, options.page, images=options.images, study=load_study(options.study))
            return 0
        study = load_study(options.study, overrides=options.set)
        only = [name.strip() for name in options.only.split(",")] if options.only else None
        disable_progress_bar()
        perform(study, options.out, only=only, seconds=options.seconds, run_seconds=options.run_seconds)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsekv.studies.ablations", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--study", type=Path, default=STUDY, help=f"the runs, as YAML ({STUDY})")
    run = commands.add_parser("run", parents=[shared], help="make the runs that are not in OUT yet")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--only", help="names of runs, with commas between")
    run.add_argument("--set", action="append", default=[], metavar="key=value", help="over the study's base")
    run.add_argument("--seconds", type=float, default=float("inf"), help="no further run is begun after this time")
    run.add_argument("--run-seconds", type=float, default=float("inf"), help="skip runs expected to train for longer")
    report = commands.add_parser("report", parents=[shared], help="tables and pictures of the results")
    report.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    report.add_argument("page", type=Path, metavar="PAGE.md")
    report.add_argument("--images", type=Path, default=None, help="folder of the pictures (img beside the page)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
