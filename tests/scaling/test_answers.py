"""Where answers stand in texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.scaling.answers import EXTRACTORS


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boxed", r"so \boxed{1} or \boxed{ x  + \frac{1}{2} }.", r"x + \frac{1}{2}"),
        ("boxed", r"\boxed{1}</think> it is", None),
        ("boxed", r"\boxed{1", None),
        ("letter", r"\boxed{C}", "C"),
        ("letter", "The answer is (D).", "D"),
        ("letter", "none", None),
        ("number", "12 boats, 1,000.50 in all", "1000.5"),
        ("number", "it is -07.", "-7"),
        ("number", "x3 or 4th", None),
        ("number", "<think>5</think>", None),
        ("number", "-0.0", "0"),
        ("line", "first\n  second \n\n", "second"),
        ("text", "thought</think>  a\n b ", "a b"),
        ("text", "  \n", None),
    ],
)
def test_answers(name: str, text: str, answer: str | None) -> None:
    assert EXTRACTORS[name](text) == answer


@given(st.sampled_from(sorted(EXTRACTORS)), st.text() | st.from_regex(r"[-+\d,.{}\\boxed ]{0,40}"))
def test_none_raises_and_an_answer_is_its_own_form(name: str, text: str) -> None:
    answer = EXTRACTORS[name](text)
    assert answer is None or answer == " ".join(answer.split()) != ""
