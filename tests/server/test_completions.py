"""Completions by the official client: texts and token ids, several prompts, echo, log-probabilities."""

from typing import Any

import pytest
import torch

from http_serving import Running
from serving import alone
from sparsekv import SamplingParams, SparseCache


def create(running: Running, prompt: Any, **options: Any) -> Any:
    given = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0} | options
    return running.client().completions.create(**given)


def test_texts_and_ids(running: Running) -> None:
    ids = running.llm.tokenizer.encode("under green light")
    expected = running.llm.tokenizer.decode(alone(running.llm.model, ids, 8), skip_special_tokens=True)
    for prompt in ("under green light", ids, ["under green light"], [ids]):
        reply = create(running, prompt)
        assert reply.choices[0].text == expected
        assert reply.object == "text_completion"


def test_several_prompts_keep_their_places(running: Running) -> None:
    prompts = ["the river", "a mountain sails", "light"]
    options: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5}
    params = SamplingParams(max_tokens=8, **options)
    expected = [c.text for o in running.llm.generate(prompts, [params] * 3) for c in o.outputs]
    whole = create(running, prompts, **options)
    assert [c.index for c in whole.choices] == list(range(6))
    assert [c.text for c in whole.choices] == expected
    texts = [""] * 6
    for chunk in create(running, prompts, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_scored(running: Running, stream: bool) -> None:
    """What lm-evaluation-harness asks for."""
    ids = running.llm.tokenizer.encode("the old ship turns slowly")
    reply = create(running, [ids], max_tokens=1, logprobs=1, echo=True, stream=stream)
    choices = [c for chunk in reply for c in chunk.choices] if stream else reply.choices
    assert "".join(c.text for c in choices).startswith("the old ship turns slowly")
    found = choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 1
    assert found.token_logprobs[0] is None
    with torch.no_grad():
        logits = running.llm.model(torch.tensor([ids]), past_key_values=SparseCache(running.llm.model)).logits[0]
    scores = logits.log_softmax(-1)
    for position, token in enumerate(ids[1:]):
        assert found.token_logprobs[position + 1] == pytest.approx(float(scores[position, token]), abs=1e-9)
        assert max(found.top_logprobs[position + 1].values()) == pytest.approx(float(scores[position].max()), abs=1e-9)
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]


def test_usage_counts_each_prompt_once(running: Running) -> None:
    reply = create(running, ["the river", "the river"], n=3, seed=1, temperature=1.0)
    ids = running.llm.tokenizer.encode("the river")
    assert reply.usage.prompt_tokens == 2 * len(ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
