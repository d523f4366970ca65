"""W of n chains: against every subset written out, and against votes."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.scaling import subsets
from sparsekv.scaling.scorer import best
from sparsekv.scaling.vote import vote

problems = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(0, 4)), min_size=1, max_size=6
)  # answer, and a weight: small integers, so that sums are exact and ties come


def arrays(drawn: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    answers = np.array([a for a, _ in drawn])
    return answers, answers == 0, np.array([float(w) for _, w in drawn])


def share(tied: tuple[str, ...]) -> float:
    return ("0" in tied) / len(tied) if tied else 0.0


@given(problems, st.data())
def test_each_rule_is_the_mean_over_all_subsets(drawn: list[tuple[int, int]], data: st.DataObject) -> None:
    answers, right, weights = arrays(drawn)
    width = data.draw(st.integers(1, len(drawn)))
    texts = [None if a < 0 else str(a) for a in answers]
    chosen = [list(c) for c in combinations(range(len(drawn)), width)]
    expected = {
        "passes": [float(right[c].any()) for c in chosen],
        "votes": [share(vote([texts[i] for i in c]).tied) for c in chosen],
        "weighted": [share(vote([texts[i] for i in c], weights[c].tolist()).tied) for c in chosen],
    }
    assert subsets.passes(right, width) == pytest.approx(np.mean(expected["passes"]))
    assert subsets.votes(answers, right, width) == pytest.approx(np.mean(expected["votes"]))
    assert subsets.votes(answers, right, width, weights) == pytest.approx(np.mean(expected["weighted"]))
    order = np.random.default_rng(0).permutation(len(drawn)).astype(float)  # distinct scores: no ties
    picked = [best([texts[i] for i in c], order[c].tolist()) for c in chosen]
    hits = [p is not None and bool(right[c[p]]) for c, p in zip(chosen, picked, strict=True)]
    assert subsets.best(order, answers, right, width) == pytest.approx(np.mean(hits))


@given(problems)
def test_one_chain_is_its_own_vote_and_more_chains_pass_more(drawn: list[tuple[int, int]]) -> None:
    answers, right, _ = arrays(drawn)
    assert subsets.votes(answers, right, 1) == pytest.approx(right.mean())
    passing = [float(subsets.passes(right, w)) for w in range(1, len(drawn) + 1)]
    assert passing == sorted(passing)


def test_many_problems_at_once_and_many_subsets() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 3, size=(5, 16))
    right = answers == 0
    assert subsets.subsets(16, 8).shape == (subsets.SUBSETS, 16)
    assert (subsets.subsets(16, 8).sum(1) == 8).all()
    together = subsets.votes(answers, right, 8)
    alone = [float(subsets.votes(a, r, 8)) for a, r in zip(answers, right, strict=True)]
    assert together.tolist() == alone
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="of 16 drawn"):
            subsets.passes(right, wrong)
