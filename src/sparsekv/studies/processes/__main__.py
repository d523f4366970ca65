"""python -m sparsekv.studies.processes run OUT [--only a,b] [--set key=value]   OUT/processes.jsonl, one line a run
python -m sparsekv.studies.processes report RESULTS.jsonl PAGE.md              its table, and that of bench train

Runs start processes on all GPUs of the machine, from the repository's folder; on a CPU, which has no shards, they show
that the command works. What a run prints is in OUT/NAME.log."""

import argparse
import sys
from pathlib import Path

from sparsekv.retrofit.parse import read_yaml
from sparsekv.studies.processes.perform import perform
from sparsekv.studies.processes.report import write_page
from sparsekv.studies.processes.runs import HEADS


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake, 1 where a run failed or is out of its bound."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_page(options.results, options.page)
            return 0
        only = [name.strip() for name in options.only.split(",")] if options.only else None
        settings = _settings(options.set)
        lines = perform(
            options.out,
            settings=settings,
            only=only,
            seconds=options.seconds,
            run_seconds=options.run_seconds,
            shared=options.shared,
        )
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    latest = {line["run"]: line for line in lines}
    return int(any("error" in line or line.get("within") is False for line in latest.values()))


def _settings(pairs: list[str]) -> dict[str, object]:
    """What key=value pairs say, by their first key: those of a recipe with the pairs over it."""
    raw = read_yaml(HEADS, overrides=pairs)
    return {key: raw[key] for key in (pair.partition("=")[0].split(".")[0] for pair in pairs)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsekv.studies.processes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not in OUT yet")
    run.add_argument("out", type=Path, metavar="OUT")
    run.add_argument("--only", help="names of runs, with commas between")
    run.add_argument("--set", action="append", default=[], metavar="key=value", help="over the settings of every run")
    run.add_argument("--seconds", type=float, default=float("inf"), help="nothing runs after this time")
    run.add_argument("--run-seconds", type=float, default=240, help="a run that takes longer has failed")
    run.add_argument("--shared", action="store_true", help="other work has the GPUs too: no run's seconds count")
    report = commands.add_parser("report", help="the table of the results")
    report.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    report.add_argument("page", type=Path, metavar="PAGE.md")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
