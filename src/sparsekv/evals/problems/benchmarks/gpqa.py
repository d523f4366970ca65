"""GPQA Diamond: four choices, in an order that the problem's number decides. Voted."""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.benchmarks.answers import after_thoughts, choice
from sparsekv.evals.problems.benchmarks.records import Row, Source, chosen, named, read

LETTERS = "ABCD"
RIGHT, WRONG = "Correct Answer", tuple(f"Incorrect Answer {i}" for i in (1, 2, 3))
SOURCE = Source(dataset="Idavidrein/gpqa", subset="gpqa_diamond", split="train", columns=("Question", RIGHT, *WRONG))
INSTRUCTION = (
    "Answer the following multiple choice question. Think step by step before answering. The last line of your "
    "response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD."
)


@dataclass(frozen=True)
class GPQA:
    """path: a file or folder of the hub's columns; None = the hub."""

    path: str | None = None
    benchmark: ClassVar[str] = "gpqa-diamond"
    voted: ClassVar[bool] = True

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
        """A letter."""
        return choice(after_thoughts(text), LETTERS)

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether it is the letter."""
        return answer == problem.data["answer"]


def _problem(task: str, number: int, row: Row) -> Problem:
    name = f"{GPQA.benchmark}/test/{number}"
    texts = [str(row[column]).strip() for column in (RIGHT, *WRONG)]
    order = random.Random(name).sample(range(4), 4)
    lines = [f"{letter}) {texts[i]}" for letter, i in zip(LETTERS, order, strict=True)]
    prompt = "\n".join([INSTRUCTION, "", str(row["Question"]).strip(), "", *lines])
    return Problem(task=task, name=name, prompt=prompt, data={"answer": LETTERS[order.index(0)]})
