"""Sums in plain words, which any chat model has met. Voted. For trying things out: no chain of thought is needed.

Difficulty: digits of both numbers.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import Procedural


@dataclass(frozen=True, kw_only=True)
class Sums(Procedural):
    """data: "answer", the sum."""

    family: ClassVar[str] = "sums"
    voted: ClassVar[bool] = True
    levels: ClassVar[tuple[int, int]] = (1, 9)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Two numbers of `level` digits."""
        a, b = (rng.randrange(10 ** (self.level - 1), 10**self.level) for _ in range(2))
        return f"What is {a} + {b}?", {"a": a, "b": b, "answer": str(a + b)}

    def written(self, problem: Problem) -> str:
        """The sum said."""
        return f"{problem.data['a']} + {problem.data['b']} = {problem.data['answer']}"

    def extract(self, text: str) -> str | None:
        """The last whole number, without leading zeros."""
        found = re.findall(r"\d+", text.replace(",", ""))
        return str(int(found[-1][:99])) if found else None

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the sum."""
        return answer == problem.data["answer"]
