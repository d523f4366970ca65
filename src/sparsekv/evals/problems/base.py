"""What a task is: problems, where a chain's answer stands, and whether an answer is right."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem as a user's message."""

    task: str
    name: str
    """Unlike any other problem's of any split of the task: "countdown-16/test/3"."""
    prompt: str
    """The user's message, before the chat template."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the task needs to judge an answer: the reference, or what a verifier checks. Values as JSON has them."""


class Task(Protocol):
    """A family of problems at one difficulty."""

    voted: ClassVar[bool]
    """Answers compare as text, so that the majority of W chains is an answer (exact match); else each of W answers is
    verified and one that is right is enough (pass@all)."""

    @property
    def name(self) -> str:
        """As the registry (tasks.py) takes it: "countdown-32"."""
        ...

    def problems(self, split: str, count: int) -> list[Problem]:
        """The first `count` problems of "train", "validation" or "test": of disjoint seeds, and always the same.
        Raises ValueError for an unknown split or where there are not so many."""
        ...

    def extract(self, text: str) -> str | None:
        """The answer in a chain's text, in its normal form, so that equal answers are equal strings; None where the
        chain has none (cut off, or off the form)."""
        ...

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether an extracted answer solves the problem; never raises, whatever the answer."""
        ...
