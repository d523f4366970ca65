"""The outlook beside a walk through all steps."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sparsekv.engine.schedule.outlook import Outlook

LEAST = 4


def _walked(running: list[tuple[int, int]], expected: float, more: int) -> int:
    """Step by step: every sequence takes a token, and what ends gives back all that it wrote."""
    left = [(min(max(expected - written, LEAST), most - written), written) for written, most in running]
    left += [(expected, 0)] * more
    held = top = 0
    for step in range(1, 1 + int(max(r for r, _ in left))):
        held += sum(r >= step for r, _ in left)
        top = max(top, held)
        held -= sum(written + step for r, written in left if r == step)
    return top


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(31, 60)), max_size=5), st.integers(5, 40), st.integers(1, 4))
def test_the_most_that_all_grow(running: list[tuple[int, int]], expected: int, more: int) -> None:
    sequences: list[Any] = [SimpleNamespace(sampled=w, request=SimpleNamespace(most_new=m)) for w, m in running]
    outlook = Outlook.of(sequences, expected=expected, least=LEAST, growing=8 * len(running))
    assert outlook.tokens(more, expected) == _walked(running, expected, more)
