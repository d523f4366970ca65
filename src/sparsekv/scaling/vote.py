"""The answer of several chains: by majority, or by weights such as a scorer's.

An answer's weight is the sum over the chains that gave it, one each where nothing is said; a chain without an answer
has no vote. Of answers with equal weight the one that was given first wins, and the tie is told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What W chains amount to."""

    answer: str | None
    """The winner; None where no chain has an answer: there is no consensus."""
    tied: tuple[str, ...]
    """The answers of the largest weight in the order given: one where the vote is clear, none without any answer."""
    weights: dict[str, float]
    """By answer, in the order given."""
    voters: int
    """Chains with an answer."""

    @property
    def share(self) -> float:
        """The winner's part of all weight; 0 without one."""
        return 0.0 if self.answer is None else self.weights[self.answer] / (sum(self.weights.values()) or 1.0)


def vote(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> Vote:
    """answers: each chain's, in its normal form, None where it has none; weights: one each, finite and not negative.

    Raises ValueError for weights that are not such.
    """
    given = [1.0] * len(answers) if weights is None else list(weights)
    if len(given) != len(answers):
        raise ValueError(f"{len(given)} weights for {len(answers)} answers; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given):
        raise ValueError("a vote's weights are finite numbers of 0 or more; map scores to such, by exp for logarithms")
    total: dict[str, float] = {}
    for answer, weight in zip(answers, given, strict=True):
        if answer is not None:
            total[answer] = total.get(answer, 0.0) + weight
    top = max(total.values(), default=0.0)
    tied = tuple(answer for answer, weight in total.items() if weight == top)
    voters = sum(answer is not None for answer in answers)
    return Vote(answer=tied[0] if tied else None, tied=tied, weights=total, voters=voters)


def decided(answers: Sequence[str | None], *, chains: int) -> bool:
    """Whether the chains of `chains` that are still to come cannot change the majority of the answers so far, nor tie
    it."""
    counts = sorted((int(weight) for weight in vote(answers).weights.values()), reverse=True)
    first, second = [*counts, 0, 0][:2]
    return first > second + chains - len(answers)
