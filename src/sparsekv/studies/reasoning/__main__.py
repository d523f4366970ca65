"""python -m sparsekv.studies.reasoning data STUDY.yaml DATA             written-out chains
python -m sparsekv.studies.reasoning sft STUDY.yaml DATA MODEL          fine-tune; the same command goes on
python -m sparsekv.studies.reasoning check MODEL OUT.jsonl --tasks ...  what one chain solves
python -m sparsekv.studies.reasoning own STUDY.yaml MODEL OUT.jsonl     the model's own chains, for the retrofit"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sparsekv.studies.reasoning import config, data, draws, sft
from sparsekv.studies.runner import to_stderr


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake; 3 where fine-tuning stopped before its end."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        return _run(options)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "check":
        draws.check(
            options.model,
            options.tasks,
            options.out,
            _settings(options),
            temperatures=options.temperatures,
            count=options.count,
            say=to_stderr,
        )
        return 0
    study = config.load(options.study, overrides=options.set)
    if options.command == "data":
        data.make(study, options.out, processes=options.processes, say=to_stderr)
    elif options.command == "own":
        settings = replace(_settings(options), temperature=options.temperature)
        draws.own(study, options.model, options.out, settings, count=options.count, say=to_stderr)
    elif not sft.train(study, options.data, options.out, seconds=options.seconds, say=to_stderr):
        return 3
    return 0


def _settings(options: argparse.Namespace) -> draws.DrawSettings:
    return draws.DrawSettings(
        samples=options.samples,
        tokens=options.tokens,
        rows=options.rows,
        kv_memory=options.kv_memory,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsekv.studies.reasoning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("study", type=Path, metavar="STUDY.yaml")
    study.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="instead of what the file says")
    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument("--count", type=int, default=16, help="problems (check: of each task)")
    drawing.add_argument("--samples", type=int, default=4, help="chains a problem")
    drawing.add_argument("--tokens", type=int, default=3072, help="of a chain at most")
    drawing.add_argument("--rows", type=int, default=512, help="chains at once")
    drawing.add_argument("--kv-memory", help="the engine's pool, such as 40GiB")

    made = commands.add_parser("data", parents=[study], help="make the training data")
    made.add_argument("out", type=Path, metavar="DATA")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    tuned = commands.add_parser("sft", parents=[study], help="fine-tune, or go on")
    tuned.add_argument("data", type=Path, metavar="DATA")
    tuned.add_argument("out", type=Path, metavar="MODEL")
    tuned.add_argument("--seconds", type=float, default=float("inf"), help="stop after them, with a checkpoint")
    looked = commands.add_parser("check", parents=[drawing], help="what the plain model solves")
    looked.add_argument("model", metavar="MODEL")
    looked.add_argument("out", type=Path, metavar="OUT.jsonl")
    looked.add_argument("--tasks", nargs="+", required=True, metavar="TASK")
    looked.add_argument("--temperatures", nargs="+", type=float, default=[1.0], metavar="T", help="each in turn")
    own = commands.add_parser("own", parents=[study, drawing], help="draw the model's own chains")
    own.add_argument("model", metavar="MODEL")
    own.add_argument("out", type=Path, metavar="OUT.jsonl")
    own.add_argument("--temperature", type=float, default=1.0)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
