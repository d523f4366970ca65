"""Shuffled assignments modulo 100, one variable asked for: looked up and evaluated depth first. Voted.

    program / c=a-b / a=41 / b=7 / c?   ->   c=a-b / a=41 / b=7 / c=41-7=34 / ans 34

Difficulty: lines at most, of which there are three quarters or more. A chain has to find each line in the prompt and
each value in itself, at any distance.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import Procedural

NAMES = [chr(c) for c in (*range(97, 123), *range(65, 91))] + [a + b for a in "bdfgklmnprst" for b in "aeiou"]
MODULUS = 100
_REUSED = 0.2
"""How often an operand is any earlier variable, and not one that nothing reads yet."""
_ASKED = 0.75
"""The share of lines that the answer depends on, at least."""


@dataclass(frozen=True, kw_only=True)
class Program(Procedural):
    """data: "lines" in the order of the prompt, "asked", "answer"."""

    family: ClassVar[str] = "program"
    voted: ClassVar[bool] = True
    levels: ClassVar[tuple[int, int]] = (8, 96)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Numbers for a third of the variables, sums and differences of earlier ones for the others."""
        count = rng.randint(-(-3 * self.level // 4), self.level)
        while True:
            names = rng.sample(NAMES, count)
            lines = _assignments(rng, names, leaves=max(3, count // 3))
            trace = evaluate(lines, names[-1])
            if len(trace.values) >= _ASKED * count:
                break
        rng.shuffle(lines)
        prompt = "\n".join(["program", *lines, f"{names[-1]}?"])
        return prompt, {"lines": lines, "asked": names[-1], "answer": str(trace.values[names[-1]])}

    def written(self, problem: Problem) -> str:
        """Each line when it is needed, and again with its values when they are there."""
        lines = evaluate(problem.data["lines"], problem.data["asked"]).lines
        return "\n".join([*lines, f"ans {problem.data['answer']}"])

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the value."""
        return answer == problem.data["answer"]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was read and reckoned, and the values by variable."""

    lines: list[str]
    values: dict[str, int]


def evaluate(lines: list[str], asked: str) -> Trace:
    """Depth first from `asked`."""
    definitions = dict(line.split("=") for line in lines)
    trace = Trace(lines=[], values={})

    def visit(name: str) -> int:
        if name in trace.values:
            return trace.values[name]
        definition = definitions[name]
        trace.lines.append(f"{name}={definition}")
        if definition.isdigit():
            value = int(definition)
        else:
            sign = "+" if "+" in definition else "-"
            left, right = definition.split(sign)
            a, b = visit(left), visit(right)
            value = (a + b if sign == "+" else a - b) % MODULUS
            trace.lines.append(f"{name}={a}{sign}{b}={value}")
        trace.values[name] = value
        return value

    visit(asked)
    return trace


def _assignments(rng: random.Random, names: list[str], *, leaves: int) -> list[str]:
    lines: list[str] = []
    unread: list[str] = []
    for i, name in enumerate(names):
        if i < leaves:
            lines.append(f"{name}={rng.randrange(MODULUS)}")
        else:
            picked: list[str] = []
            for _ in range(2):
                fresh = [x for x in unread if x not in picked] if rng.random() >= _REUSED else []
                picked.append(rng.choice(fresh or [x for x in names[:i] if x not in picked]))
            lines.append(f"{name}={picked[0]}{rng.choice('+-')}{picked[1]}")
            unread = [x for x in unread if x not in picked]
        unread.append(name)
    return lines
