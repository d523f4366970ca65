"""Problems made by a rule and a seed, with the chains of thought that a small model learns to solve them by.

A prompt belongs to one split alone, by its hash: 3 of 4 to train, the rest in equal parts to validation and test. So a
test problem is never trained on, whatever the seeds, the difficulty and how many are drawn.

A chain ends with a line "ans ...". The texts are terse: a model of 135 M parameters that reads every digit as a token
learns them in minutes; one that was not trained on them cannot know what is asked.
"""

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem

SPLITS = ("train", "validation", "test")
CAP = 3000
"""Characters of a search's chain, after which it gives up without an answer."""
_BAND = 1.35
"""A search's difficulty may be off by this factor."""
_ANSWER = "\nans "


def split_of(prompt: str) -> str:
    """The one split that a prompt belongs to."""
    place = hashlib.sha256(prompt.encode()).digest()[0] % 8
    return SPLITS[place + 1] if place < 2 else "train"


@dataclass(frozen=True, kw_only=True)
class Procedural(ABC):
    """A family of problems at one difficulty. Raises ValueError for a difficulty that it has no problems of."""

    level: int
    family: ClassVar[str]
    voted: ClassVar[bool]
    certain: ClassVar[bool] = True
    """Every answer of a written chain is right."""
    levels: ClassVar[tuple[int, int]]
    """The least and the greatest difficulty."""

    def __post_init__(self) -> None:
        low, high = self.levels
        if not low <= self.level <= high:
            raise ValueError(f"{self.family} has difficulties from {low} to {high}, not {self.level}")

    @property
    def name(self) -> str:
        """ "countdown-32" """
        return f"{self.family}-{self.level}"

    @abstractmethod
    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """(a prompt, what Problem.data is to hold)."""

    def fits(self, data: dict[str, Any]) -> bool:
        """Whether what was proposed is of this difficulty."""
        return True

    @abstractmethod
    def written(self, problem: Problem) -> str:
        """A chain of thought, the same each time; a search may end without an answer, after CAP characters."""

    @abstractmethod
    def right(self, problem: Problem, answer: str) -> bool:
        """As Task.right."""

    def problem(self, split: str, number: int) -> Problem:
        """One problem, decided by (name, split, number). Two numbers may give the same."""
        if split not in SPLITS:
            raise ValueError(f"{self.name} has no split {split!r}; use one of {', '.join(SPLITS)}")
        name = f"{self.name}/{split}/{number}"
        rng = random.Random(name)
        while True:
            prompt, data = self.propose(rng)
            if split_of(prompt) == split and self.fits(data):
                return Problem(task=self.name, name=name, prompt=prompt, data=data)

    def problems(self, split: str, count: int) -> list[Problem]:
        """As Task.problems; all distinct."""
        found: dict[str, Problem] = {}
        for number in itertools.count():
            if len(found) >= count:
                break
            if number > 20 * count + 100:
                raise ValueError(f"{self.name} has no {count} distinct problems; ask for at most {len(found)}")
            problem = self.problem(split, number)
            found.setdefault(problem.prompt, problem)
        return list(found.values())

    def extract(self, text: str) -> str | None:
        """What stands in the last line "ans ..."."""
        at = f"\n{text}".rfind(_ANSWER)
        if at < 0:
            return None
        return text[at + len(_ANSWER) - 1 :].split("\n")[0].strip() or None


def within(level: int, looks: float) -> bool:
    """Whether a random search that takes `looks` looks is of a difficulty."""
    return level / _BAND <= looks <= level * _BAND
