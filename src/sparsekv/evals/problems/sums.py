"""The sum of two numbers, asked in words that any instructed model understands. Voted.

For trying a study out. Difficulty: digits of each number.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import Procedural


@dataclass(frozen=True, kw_only=True)
class Sums(Procedural):
    """data: "terms"."""

    family: ClassVar[str] = "sums"
    voted: ClassVar[bool] = True
    levels: ClassVar[tuple[int, int]] = (1, 9)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Two numbers of `level` digits."""
        a, b = (rng.randrange(10 ** (self.level - 1), 10**self.level) for _ in range(2))
        return f"What is {a} + {b}?", {"terms": [a, b]}

    def written(self, problem: Problem) -> str:
        """One line."""
        a, b = problem.data["terms"]
        return f"{a} + {b} = {a + b}"

    def extract(self, text: str) -> str | None:
        """The last whole number."""
        found = re.findall(r"[0-9]+", text.replace(",", ""))
        return found[-1] if found else None

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the sum."""
        return answer == str(sum(problem.data["terms"]))
