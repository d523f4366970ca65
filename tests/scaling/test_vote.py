"""Votes: what wins, what is told of ties, and when no chain still to come can matter."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.scaling.vote import decided, vote

answers = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=7)


def test_ties_and_no_consensus_are_told() -> None:
    clear = vote(["7", None, "8", "7"])
    assert (clear.answer, clear.tied, clear.voters, clear.share) == ("7", ("7",), 3, 2 / 3)
    tie = vote(["8", "7", "7", "8", None])
    assert (tie.answer, tie.tied) == ("8", ("8", "7"))
    nobody = vote([None, None])
    assert (nobody.answer, nobody.tied, nobody.voters, nobody.share) == (None, (), 0, 0)
    assert vote([]).answer is None


def test_weights_can_turn_a_majority() -> None:
    found = vote(["7", "7", "8", None], [0.2, 0.3, 0.9, 5.0])
    assert (found.answer, found.weights) == ("8", {"7": 0.5, "8": 0.9})
    assert vote(["7", "8"], [0.0, 0.0]).tied == ("7", "8")
    for wrong in ([1.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="weights"):
            vote(["7", "8"], wrong)


@given(answers)
def test_the_winner_has_no_better(given_answers: list[str | None]) -> None:
    found = vote(given_answers)
    counts = {a: given_answers.count(a) for a in given_answers if a is not None}
    assert found.weights == counts
    assert all(counts[a] == max(counts.values()) for a in found.tied)
    assert len(found.tied) == sum(n == max(counts.values()) for n in counts.values())


@given(answers, st.integers(0, 3))
def test_decided_is_exactly_when_nothing_to_come_matters(so_far: list[str | None], left: int) -> None:
    found = vote(so_far)
    others = ["a", "b", "c", "new", None]
    same = all(vote([*so_far, *rest]).tied == found.tied for rest in product(others, repeat=left))
    assert decided(so_far, chains=len(so_far) + left) == (same and len(found.tied) == 1)
