r"""AIME 24 and 25, MATH-500 and GSM8K: a problem in words, an answer in \boxed{}. Voted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.benchmarks.answers import after_thoughts, boxed, equal, normal
from sparsekv.evals.problems.benchmarks.records import Row, Source, chosen, named, read

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a benchmark calls its columns."""

    source: Source
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    whole: bool = False
    """Whether answers are whole numbers."""


def _form(dataset: str, question: str, *, split: str = "test", subset: str | None = None, whole: bool = False) -> Form:
    source = Source(dataset=dataset, subset=subset, split=split, columns=(question, "answer"))
    return Form(
        source=source,
        question=lambda row: str(row[question]),
        answer=lambda row: str(row["answer"]).rpartition("####")[2].strip(),  # GSM8K's is after a solution
        whole=whole,
    )


FORMS = {
    "aime24": _form("HuggingFaceH4/aime_2024", "problem", split="train", whole=True),
    "aime25": _form("math-ai/aime25", "problem", whole=True),
    "math-500": _form("HuggingFaceH4/MATH-500", "problem"),
    "gsm8k": _form("openai/gsm8k", "question", subset="main", whole=True),
}


@dataclass(frozen=True)
class Mathematics:
    """One of FORMS. path: a file or folder of the hub's columns; None = the hub."""

    benchmark: str
    path: str | None = None
    voted: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """With the path, as the registry takes it."""
        return named(self.benchmark, self.path)

    @cached_property
    def _all(self) -> list[Problem]:
        form = FORMS[self.benchmark]
        return [
            Problem(
                task=self.name,
                name=f"{self.benchmark}/test/{number}",
                prompt=f"{form.question(row)}\n\n{INSTRUCTION}",
                data={"answer": form.answer(row)},
            )
            for number, row in enumerate(read(form.source, self.path))
        ]

    def problems(self, split: str, count: int) -> list[Problem]:
        """As Task.problems."""
        return chosen(self._all, split, count, name=self.name)

    def extract(self, text: str) -> str | None:
        """In its normal form; of a benchmark of whole numbers, none that is not one."""
        found = boxed(after_thoughts(text))
        if found is None:
            return None
        answer = normal(found) or None
        whole = answer is not None and answer.lstrip("-").isdigit()
        return answer if whole or not FORMS[self.benchmark].whole else None

    def right(self, problem: Problem, answer: str) -> bool:
        """As Task.right."""
        return equal(problem.data["answer"], answer)
