"""The largest sum of three of eight numbers that is not above a bound: random looks until many in a row were no better.
Voted: nothing verifies an answer, and a chain that stops too early ends in a wrong one.

A line is a look: three of the numbers and their sum, the best sum so far (0 before one fits), and how many looks in a
row were no better.

    largest 12,23,41,47,58,60,74,91<=140 24
    ->
    12+41+60=113 113 0
    23+58+74=155 113 1
    12+47+74=133 133 0
    ...
    ans 133                  after 24 looks in a row that were no better; 138 would have been right

Difficulty: the patience, how many looks in a row without a better one end a chain. It stands in the prompt.
"""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import CAP, Procedural


@dataclass(frozen=True, kw_only=True)
class Largest(Procedural):
    """data: "numbers" in order, "bound", "answer"."""

    family: ClassVar[str] = "largest"
    voted: ClassVar[bool] = True
    certain: ClassVar[bool] = False
    levels: ClassVar[tuple[int, int]] = (8, 48)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Numbers of two digits, and a bound from the first to the third quartile of their 56 sums."""
        numbers = sorted(rng.sample(range(10, 100), 8))
        sums = sorted(map(sum, combinations(numbers, 3)))
        bound = rng.randint(sums[14], sums[41])
        answer = max(x for x in sums if x <= bound)
        prompt = f"largest {','.join(map(str, numbers))}<={bound} {self.level}"
        return prompt, {"numbers": numbers, "bound": bound, "answer": str(answer)}

    def written(self, problem: Problem) -> str:
        """Looks that choose uniformly; the answer is the best of them."""
        rng = random.Random(f"written/{problem.name}")
        numbers, bound = problem.data["numbers"], problem.data["bound"]
        best = misses = 0
        lines: list[str] = []
        while sum(map(len, lines)) + len(lines) < CAP:
            look = sorted(rng.sample(numbers, 3))
            total = sum(look)
            if best < total <= bound:
                best, misses = total, 0
            else:
                misses += 1
            lines.append(f"{'+'.join(map(str, look))}={total} {best} {misses}")
            if misses == self.level:
                return "\n".join([*lines, f"ans {best}"])
        return "\n".join(lines)

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the largest sum."""
        return answer == problem.data["answer"]
