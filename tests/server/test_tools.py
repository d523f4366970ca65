"""Tool calls in texts: whole, growing, broken."""

import json

from hypothesis import given
from hypothesis import strategies as st

from sparsekv.server.openai.tools import BEGIN, END, split

CALL = BEGIN + '{"name": "f", "arguments": {"x": [1, "é"]}}' + END


def test_calls_leave_the_text() -> None:
    said, calls = split(f"so:\n{CALL}\n{CALL}", final=True)
    assert said == "so:"
    assert [call.name for call in calls] == ["f", "f"]
    assert json.loads(calls[0].arguments) == {"x": [1, "é"]}
    assert json.loads(split(f'{BEGIN}{{"name": "g"}}{END}', final=True)[1][0].arguments) == {}


def test_what_is_no_call_stays_text() -> None:
    for text in (
        f"{BEGIN}no json{END}",
        f"{BEGIN}[1]{END}",
        f"{BEGIN}{{}}{END}",
        f"a {BEGIN}cut off",
        "a < b <tool",
        "",
    ):
        assert split(text, final=True) == (text, [])


@given(st.lists(st.sampled_from(["so ", "\n", "<", "<tool", CALL, BEGIN, END, "{", "x"]), max_size=8).map("".join))
def test_a_growing_text_never_takes_back(text: str) -> None:
    before, known = "", []
    for end in range(len(text) + 1):
        said, calls = split(text[:end], final=False)
        assert said.startswith(before)
        assert calls[: len(known)] == known
        before, known = said, calls
    said, calls = split(text, final=True)
    assert said.startswith(before)
    assert calls[: len(known)] == known
