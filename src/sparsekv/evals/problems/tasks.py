"""Tasks by name: a family's difficulty ("program-60"), or a benchmark from the hub ("math-500") or from a file
("math-500=math.jsonl"). Each is imported when it is asked for."""

import re
from importlib import import_module
from typing import Any

from sparsekv.evals.problems.base import Task
from sparsekv.evals.problems.procedural import Procedural

_FAMILIES = {
    "countdown": "countdown.Countdown",
    "largest": "largest.Largest",
    "paths": "paths.Paths",
    "program": "program.Program",
    "sums": "sums.Sums",
    "times": "times.Times",
}
_MATHEMATICS = ("aime24", "aime25", "gsm8k", "math-500")
_OTHERS = {"gpqa-diamond": "gpqa.GPQA", "livecodebench": "livecodebench.LiveCodeBench"}


def names() -> list[str]:
    """What `get` takes, N standing for a difficulty."""
    return [*(f"{family}-N" for family in _FAMILIES), *sorted([*_MATHEMATICS, *_OTHERS])]


def get(name: str) -> Task:
    """A task by its name. Raises ValueError for an unknown one, and a difficulty that the family does not have."""
    found = re.fullmatch(r"([a-z]+)-([0-9]{1,4})", name)
    if found and found[1] in _FAMILIES:
        return procedural(found[1], int(found[2]))
    benchmark, given, path = name.partition("=")
    if benchmark in _MATHEMATICS:
        return _kind("benchmarks.mathematics.Mathematics")(benchmark, path if given else None)
    if benchmark in _OTHERS:
        return _kind(f"benchmarks.{_OTHERS[benchmark]}")(path if given else None)
    raise ValueError(f"there is no task {name!r}; use one of {', '.join(names())}, such as countdown-32")


def procedural(family: str, level: int) -> Procedural:
    """A family at a difficulty, with its written-out chains. Raises ValueError as get does."""
    if family not in _FAMILIES:
        raise ValueError(f"there is no family {family!r}; use one of {', '.join(_FAMILIES)}")
    return _kind(_FAMILIES[family])(level=level)


def _kind(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return getattr(import_module(f"sparsekv.evals.problems.{module}"), kind)
