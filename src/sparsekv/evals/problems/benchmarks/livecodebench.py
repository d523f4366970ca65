"""LiveCodeBench: programs that read and print, or methods that are called; right where every test passes. Verified.

Tests are in the rows: public ones as JSON, private ones as JSON or packed (base64, zlib, pickle of that JSON).
"""

import base64
import io
import json
import pickle
import re
import zlib
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.benchmarks.answers import after_thoughts
from sparsekv.evals.problems.benchmarks.records import Row, Source, chosen, named, read
from sparsekv.evals.problems.benchmarks.sandbox import Limits, run

SOURCE = Source(
    dataset="livecodebench/code_generation_lite",
    file="test.jsonl",
    columns=("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
)
READS = (
    "Read the inputs from stdin, solve the problem and write the answer to stdout. Enclose your code within ```python."
)
CALLED = "Use the following starter code, and enclose your code within ```python."
PREAMBLE = """import sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
sys.setrecursionlimit(50000)
"""
CALL = """
import json as _json
_arguments = [_json.loads(_line) for _line in sys.stdin.read().split("\\n") if _line.strip()]
print("\\n" + _json.dumps(Solution().{name}(*_arguments)))
"""


@dataclass(frozen=True)
class LiveCodeBench:
    """path: a file of the hub's columns, such as test5.jsonl; None = the hub's first."""

    path: str | None = None
    limits: Limits = field(default_factory=Limits)
    """Of each test."""
    benchmark: ClassVar[str] = "livecodebench"
    voted: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """With the path, as the registry takes it."""
        return named(self.benchmark, self.path)

    @cached_property
    def _all(self) -> list[Problem]:
        return [_problem(self.name, number, row) for number, row in enumerate(read(SOURCE, self.path))]

    def problems(self, split: str, count: int) -> list[Problem]:
        """As Task.problems."""
        return chosen(self._all, split, count, name=self.name)

    def extract(self, text: str) -> str | None:
        """The last block of code that was closed."""
        found = re.findall(r"```(?:python3?|py)?[ \\t]*\n(.*?)```", after_thoughts(text), re.DOTALL)
        return (found[-1].rstrip() or None) if found else None

    def right(self, problem: Problem, answer: str) -> bool:
        """As Task.right: each test in a sandbox, until one fails."""
        called = problem.data["called"]
        program = PREAMBLE + answer + (CALL.format(name=called) if called else "")
        for test in problem.data["tests"]:
            outcome = run(program, test["input"], limits=self.limits)
            same = _same_value if called else _same_output
            if outcome.status != "ok" or not same(outcome.output, test["output"]):
                return False
        return True


def _problem(task: str, number: int, row: Row) -> Problem:
    metadata = json.loads(row["metadata"] or "{}")
    called = metadata.get("func_name") or ""
    tests = [
        {"input": test["input"], "output": test["output"]}
        for column in ("public_test_cases", "private_test_cases")
        for test in unpacked(row[column])
    ]
    parts = [str(row["question_content"]).strip(), CALLED if called else READS]
    if called:
        parts.append(f"```python\n{row['starter_code']}\n```")
    return Problem(
        task=task,
        name=f"{LiveCodeBench.benchmark}/test/{number}",
        prompt="\n\n".join(parts),
        data={"called": called, "tests": tests},
    )


def unpacked(tests: str) -> list[dict[str, str]]:
    """A column of tests. Raises ValueError for what is neither JSON nor packed JSON."""
    try:
        return json.loads(tests)
    except json.JSONDecodeError:
        pass
    try:
        return json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(tests)))).load())
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"a test column is neither JSON nor packed JSON: {error}") from None


class _TextUnpickler(pickle.Unpickler):
    """Of a text, which names no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and is to be a text")


def _same_output(made: str, wanted: str) -> bool:
    """Line by line, blanks at the ends aside; numbers by their value."""
    a, b = ([line.strip() for line in text.strip().split("\n")] for text in (made, wanted))
    return len(a) == len(b) and all(x == y or _numbers(x) == _numbers(y) != [] for x, y in zip(a, b, strict=True))


def _numbers(line: str) -> list[Decimal]:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return []


def _same_value(made: str, wanted: str) -> bool:
    """The last line that was printed, as JSON."""
    try:
        return json.loads(made.rstrip("\n").split("\n")[-1]) == json.loads(wanted)
    except ValueError:
        return False
