"""Reach a target with four numbers, each used once: a random depth-first search with its dead ends. Verified.

    countdown 3,7,9,25=64   ->   25-9=16:3,7,16 / 7-3=4:4,16 / 4+16=20,16-4=12,4*16=64! / ans 25-9=16,7-3=4,4*16=64

Difficulty: how many pairs of two last numbers a random search looks at until one gives the target.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import CAP, Procedural, within

Numbers = tuple[int, ...]
_STEP = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")
_LARGEST = {3: 200, 2: 200, 1: 100}
"""Of a product, by how many numbers are left; sums of the last two end at the same."""


@dataclass(frozen=True, kw_only=True)
class Countdown(Procedural):
    """data: "numbers" in order, "target"."""

    family: ClassVar[str] = "countdown"
    voted: ClassVar[bool] = False
    levels: ClassVar[tuple[int, int]] = (4, 128)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Four numbers of 2 to 25, a target of 11 to 100 that is none of them and is as hard to find as asked."""
        while True:
            numbers = sorted(rng.randint(2, 25) for _ in range(4))
            found = shares(tuple(numbers))
            targets = [x for x in range(11, 101) if x in found and within(self.level, 1 / found[x])]
            targets = [x for x in targets if x not in numbers]
            if targets:
                target = rng.choice(targets)
                return f"countdown {_listed(numbers)}={target}", {"numbers": numbers, "target": target}

    def written(self, problem: Problem) -> str:
        """A first step, three to six second steps each with all third steps, and so on anew."""
        rng = random.Random(f"written/{problem.name}")
        start, target = tuple(problem.data["numbers"]), problem.data["target"]
        firsts = [(text, three) for text, three in steps(start) if steps(three)]
        lines: list[str] = []
        while sum(map(len, lines)) + len(lines) < CAP:
            first, three = rng.choice(firsts)
            lines += [_listed(start), f"{first}:{_listed(three)}"]
            seconds = steps(three)
            for second, two in rng.sample(seconds, min(len(seconds), rng.randint(3, 6))):
                lines.append(f"{second}:{_listed(two)}")
                tried: list[str] = []
                for third, (value,) in steps(two):
                    tried.append(third)
                    if value == target:
                        return "\n".join([*lines, f"{','.join(tried)}!", f"ans {first},{second},{third}"])
                lines.append(",".join(tried) or "-")
        return "\n".join(lines)

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether "25-3=22,4*7=28,22+28=50" uses each number once, reckons right and reaches the target."""
        have = list(problem.data["numbers"])
        for step in answer.split(","):
            found = _STEP.fullmatch(step)
            if found is None:
                return False
            a, b, value = (int(found[i]) for i in (1, 3, 4))
            for used in (a, b):
                if used not in have:
                    return False
                have.remove(used)
            if _result(a, found[2], b) != value:
                return False
            have.append(value)
        return have == [problem.data["target"]]


def _result(a: int, sign: str, b: int) -> int | None:
    if sign == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def steps(numbers: Numbers) -> list[tuple[str, Numbers]]:
    """(an operation on two of the numbers as text, the numbers after it in order), each once; the larger number stands
    first. Products and last sums that are too large are not searched."""
    found: dict[str, Numbers] = {}
    limit = _LARGEST[len(numbers) - 1]
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            a, b = numbers[i], numbers[j]
            if i == j or a < b or (a == b and i > j):
                continue
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            results = {}
            if len(numbers) > 2 or a + b <= limit:
                results["+"] = a + b
            if a > b:
                results["-"] = a - b
            if b > 1 and a * b <= limit:
                results["*"] = a * b
            if b > 1 and a % b == 0:
                results["/"] = a // b
            for sign, value in results.items():
                found[f"{a}{sign}{b}={value}"] = tuple(sorted((*rest, value)))
    return list(found.items())


def shares(numbers: Numbers) -> dict[int, float]:
    """By target: the share of looks at two last numbers that find it."""
    found: dict[int, float] = {}
    firsts = [pairs for _, three in steps(numbers) if (pairs := [two for _, two in steps(three)])]
    for pairs in firsts:
        for two in pairs:
            for value in {value for _, (value,) in steps(two)}:
                found[value] = found.get(value, 0.0) + 1 / (len(pairs) * len(firsts))
    return found


def _listed(numbers: Any) -> str:
    return ",".join(map(str, numbers))
