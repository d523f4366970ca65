"""The product of two numbers, digit by digit with carries, least digit first. Voted.

Numbers are written least digit first from the chain's first line on. For each digit of the second number: its products
with the first number's digits, what they add up to with what is left of the rows before, and the digits that are done.

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
    levels: ClassVar[tuple[int, int]] = (2, 12)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """The larger number stands first."""
        small = rng.randint(max(1, self.level - 2), self.level)
        b, a = sorted(rng.randrange(10 ** (n - 1), 10**n) for n in (small, self.level))
        return f"times {a}*{b}", {"a": a, "b": b, "answer": _reversed(a * b)}

    def written(self, problem: Problem) -> str:
        """Long multiplication, one row a digit."""
        a, b = _reversed(problem.data["a"]), _reversed(problem.data["b"])
        lines, done, held = [f"{a}*{b}"], "", "0" * (len(a) + 1)
        for digit in b:
            products, row = _carried([(f"{digit}*{x}", int(digit) * int(x)) for x in a])
            lines.append(f"{digit}*{a}:{products}:{row}")
            sums, total = _carried([(f"{p}+{q}", int(p) + int(q)) for p, q in zip(held, row, strict=True)])
            done, held = done + total[0], total[1:]
            lines.append(f"{sums}:{total[:-1]} {done}")
        answer = (done + held).rstrip("0")  # the zeros before the product
        assert answer == problem.data["answer"]
        return "\n".join([*lines, f"ans {answer}"])

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the product."""
        return answer == problem.data["answer"]


def _carried(terms: list[tuple[str, int]]) -> tuple[str, str]:
    """(each term with its carry and the two digits of the sum, the digits least first with the last carry)."""
    shown, digits, carry = [], "", 0
    for text, value in terms:
        total = value + carry
        shown.append(f"{text}+{carry}={total:02d}")
        digits += str(total % 10)
        carry = total // 10
    return ",".join(shown), digits + str(carry)


def _reversed(number: int) -> str:
    return str(number)[::-1]
