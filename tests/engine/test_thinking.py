"""A thinking budget: the marker comes at its place at the latest, the chain before it is what it would have been, and
steps that overlap change nothing."""

from typing import Any

import pytest

from helpers import VOCABULARY
from serving import assert_empty, attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine import ThinkingBudget

END = (7, 9)


def drawn(llm: LLM, budget: ThinkingBudget | None, **options: Any) -> list[list[int]]:
    params = SamplingParams(n=3, max_tokens=16, temperature=1.0, seed=1, thinking=budget, **options)
    found = [c.token_ids for output in llm.generate(prompts(6, 11), params) for c in output.outputs]
    assert_empty(llm)
    return found


def marker_at(ids: list[int], end: tuple[int, ...]) -> int:
    return next(i for i in range(len(ids)) if tuple(ids[i : i + len(end)]) == end)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 8])
@pytest.mark.parametrize("end", [(7,), END])
def test_the_marker_comes_in_time(overlapping: bool, tokens: int, end: tuple[int, ...]) -> None:
    model = attached("dms")
    llm = engine(model, async_scheduling=overlapping)
    free = drawn(llm, None)
    for plain, ids in zip(free, drawn(llm, ThinkingBudget(tokens=tokens, end=end)), strict=True):
        at = marker_at(ids, end)
        assert at <= tokens
        assert len(ids) == 16
        if at == tokens:
            before = max(tokens - 1, 0)  # where the marker's last token is banned
            assert ids[:before] == plain[:before]


def test_a_thought_that_ends_by_itself_is_not_ended_again() -> None:
    llm, bias = engine(attached("dms")), {7: 4.0}
    free = drawn(llm, None, logit_bias=bias)
    closed = [i for i, ids in enumerate(free) if 7 in ids[:5]]
    assert closed
    bounded = drawn(llm, ThinkingBudget(tokens=7, end=(7,)), logit_bias=bias)
    assert all(bounded[i] == free[i] for i in closed)


def test_overlapping_steps_draw_the_same() -> None:
    model = attached("dms")
    budget = ThinkingBudget(tokens=5, end=END)
    bias = {7: 3.0, 9: 3.0}
    plain, ahead = (drawn(engine(model, async_scheduling=on), budget, logit_bias=bias) for on in (False, True))
    assert plain == ahead


def test_what_cannot_be_a_budget() -> None:
    with pytest.raises(ValueError, match="max_tokens 9 leaves no room for an answer after 9 tokens"):
        SamplingParams(max_tokens=9, thinking=ThinkingBudget(tokens=7, end=END))
    with pytest.raises(ValueError, match="end marker has no tokens"):
        ThinkingBudget(tokens=7, end=())
    with pytest.raises(ValueError, match="-1; use"):
        ThinkingBudget(tokens=-1, end=END)
    llm = engine(attached("dms"))
    unknown = SamplingParams(max_tokens=9, thinking=ThinkingBudget(tokens=2, end=(VOCABULARY,)))
    with pytest.raises(ValueError, match="the thinking budget's end marker holds 61"):
        llm.generate(prompts(4), unknown)
