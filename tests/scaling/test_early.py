"""Early stop: the winner is that of all chains, the losers' pages return at once, others' chains go on."""

from typing import Any

import pytest

import tiny
from helpers import check_pages
from serving import assert_empty, attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.scaling.budget import end_marker, with_budget
from sparsekv.scaling.early import Decided, answer_of
from sparsekv.scaling.vote import vote

CHAINS = 6


@pytest.fixture(scope="module", params=[False, True], ids=["one step at a time", "overlapping"])
def llm(request: pytest.FixtureRequest) -> LLM:
    text = tiny.tokenizer()
    return engine(attached("dms", vocab_size=len(text)), tokenizer=text, async_scheduling=request.param)


def extract(text: str) -> str | None:
    return None if not text else str(len(text) % 2)


def ending(llm: LLM, **options: Any) -> SamplingParams:
    """Chains of many lengths: a third of the vocabulary ends one."""
    many = list(range(1, len(llm.tokenizer), 9))
    return SamplingParams(n=CHAINS, max_tokens=24, temperature=1.5, stop_token_ids=many, **options)


def test_the_winner_is_that_of_all_chains(llm: LLM) -> None:
    stopped = 0
    asked = prompts(5, 9, 7)
    for seed in range(8):
        whole = llm.generate(asked, ending(llm, seed=seed))
        early = llm.generate(asked, ending(llm, seed=seed), stop_when=Decided(chains=CHAINS, extract=extract))
        assert_empty(llm)
        for all_of, some in zip(whole, early, strict=True):
            found = [vote([answer_of(c, extract) for c in o.outputs]) for o in (all_of, some)]
            assert some.finished
            aborted = [c for c in some.outputs if c.finish_reason == "abort"]
            stopped += len(aborted)
            if aborted:
                assert found[0].tied == found[1].tied[:1]
                assert {c.stop_reason for c in aborted} == {"stop_when"}
            for a, b in zip(all_of.outputs, some.outputs, strict=True):
                assert b.token_ids == a.token_ids[: len(b.token_ids)]
    assert stopped > 0


def test_pages_return_in_the_step_that_decides(llm: LLM) -> None:
    """The losers of one request leave while another still runs."""
    engine_, ragged = llm.engine, llm.engine.runner.ragged
    first, second = prompts(5, 9)
    losers = engine_.add(first, ending(llm, seed=0), stop_when=lambda finished: True)
    other = engine_.add(second, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    while not losers.finished:
        engine_.step()
    assert [s.finish_reason for s in losers.sequences].count("stop") == 1
    assert not other.finished
    held = ragged.lengths.sum((0, 2)).nonzero().flatten().tolist()
    assert held == [other.sequences[0].row]
    check_pages(ragged)
    while engine_.has_work:
        engine_.step()
    assert len(other.sequences[0].output) == 30
    assert_empty(llm)


def test_a_budget_from_the_tokenizer_or_given() -> None:
    text = tiny.tokenizer()
    with pytest.raises(ValueError, match="none of the end markers </think>"):
        with_budget(SamplingParams(), text, thinking=4, answer=2)
    params = with_budget(SamplingParams(n=2, seed=1), text, thinking=4, answer=2, marker="the old")
    assert params.thinking is not None
    assert text.decode(params.thinking.end) == "the old"
    assert params.max_tokens == 4 + len(params.thinking.end) + 2
    assert params.n == 2
    with pytest.raises(ValueError, match="room for at least one"):
        with_budget(SamplingParams(), text, thinking=4, answer=0, marker="the")
    text.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert end_marker(text) == (text.convert_tokens_to_ids("</think>"),)
