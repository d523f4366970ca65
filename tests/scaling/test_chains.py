"""One draw serves every shorter length: cut at l, it is what a draw of at most l tokens gives."""

import pytest

import tiny
from helpers import tiny_model
from serving import attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.scaling.chains import Chain, draw_chains

SEEDS = [3, 4]


def llm_of(policy: str) -> LLM:
    text = tiny.tokenizer()
    return engine(attached(policy, vocab_size=len(text)), tokenizer=text)


def drawn(llm: LLM, *, tokens: int, width: int = 3) -> list[list[Chain]]:
    ends = list(range(1, len(llm.tokenizer), 24))  # so that chains end at many lengths
    params = SamplingParams(n=width, max_tokens=tokens, temperature=1.5, stop_token_ids=ends)
    return draw_chains(llm, prompts(9, 5), params, seeds=SEEDS)


@pytest.mark.parametrize("policy", ["dense", "dms", "streaming"])
def test_a_cut_is_a_shorter_draw(policy: str) -> None:
    llm = llm_of(policy)
    whole = drawn(llm, tokens=30)
    assert {chain.ended for chains in whole for chain in chains} == {True, False}
    for length in (1, 4, 13, 30):
        for long, short in zip(whole, drawn(llm, tokens=length), strict=True):
            for a, b in zip(long, short, strict=True):
                assert a.at(length) == b.at(length)
                assert a.ended_by(length) == b.ended
                assert min(a.tokens, length) == b.tokens
                assert not b.ended or a.text == b.text


def test_fewer_chains_are_the_first_of_more() -> None:
    llm = llm_of("dms")
    more, fewer = drawn(llm, tokens=12), drawn(llm, tokens=12, width=2)
    assert [[c.text for c in own[:2]] for own in more] == [[c.text for c in own] for own in fewer]


def test_a_prompt_that_never_fits_is_refused() -> None:
    llm = engine(tiny_model(), tokenizer=tiny.tokenizer(), policy="dense", max_model_len=16)
    with pytest.raises(ValueError, match="the prompt has 20 tokens and the context is 16"):
        draw_chains(llm, prompts(20), SamplingParams(n=2), seeds=[0])
