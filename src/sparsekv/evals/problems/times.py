"""The product of two numbers, row by row, least digit first. Voted.

Numbers are written least digit first from the chain's first line on. For each digit of the second number: its product
with the first number, then what that and the rows before add up to, and behind it the digits that are done.

    times 62*17   ->   26*71 / 7*26:434 / 34 4 / 1*26:260 / 01 45 / ans 4501

Difficulty: digits of the first number; the second has up to two fewer.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import Procedural


@dataclass(frozen=True, kw_only=True)
class Times(Procedural):
    """data: "a" and "b", numbers; "answer", their product least digit first."""

    family: ClassVar[str] = "times"
    voted: ClassVar[bool] = True
    levels: ClassVar[tuple[int, int]] = (2, 16)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """The larger number stands first."""
        small = rng.randint(max(1, self.level - 2), self.level)
        b, a = sorted(rng.randrange(10 ** (n - 1), 10**n) for n in (small, self.level))
        return f"times {a}*{b}", {"a": a, "b": b, "answer": _reversed(a * b)}

    def written(self, problem: Problem) -> str:
        """Long multiplication, a product and a sum for each digit, in one go each."""
        first, a, b = problem.data["a"], _reversed(problem.data["a"]), _reversed(problem.data["b"])
        lines, done, held, size = [f"{a}*{b}"], "", 0, len(a)
        for digit in b:
            row = int(digit) * first
            total = _reversed(row + held).ljust(size + 1, "0")
            done, held = done + total[0], (row + held) // 10
            lines += [f"{digit}*{a}:{_reversed(row).ljust(size + 1, '0')}", f"{total[1:]} {done}"]
        answer = (done + _reversed(held)).rstrip("0")  # the zeros before the product
        assert answer == problem.data["answer"]
        return "\n".join([*lines, f"ans {answer}"])

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the product."""
        return answer == problem.data["answer"]


def _reversed(number: int) -> str:
    return str(number)[::-1]
