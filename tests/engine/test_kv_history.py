"""One long draw tells what every shorter one would have held and read."""

from typing import Any

import pytest
import torch

import sparsekv
from helpers import random_heads, tiny_model
from serving import PAGE, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine import CompletionOutput, KVHistory

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dms": {"window": 4},
    "streaming": {"budget": 12},
    "tova": {"budget": 12},
    "snapkv": {"budget": 36},
    "quest": {"budget": 12, "page_size": 4},
    "dms-quest": {"budget": 12, "page_size": 4, "window": 4},
}
PROMPTS = prompts(5, 27, 40)
LONG = 24
WHOLE = {"max_num_batched_tokens": 128}
"""Prompts in one chunk: which tokens share a page, and so what dms-quest chooses, depends on the chunks."""


def _model(policy: str) -> Any:
    model = tiny_model(dtype=torch.float64, num_hidden_layers=4)
    sparsekv.attach(model, policy=policy, **POLICIES[policy])
    return random_heads(model) if policy.startswith("dms") else model


def _history(sample: CompletionOutput) -> KVHistory:
    assert sample.kv_history is not None
    return sample.kv_history


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ahead", [False, True])
def test_any_length_is_a_run_that_ended_there(policy: str, ahead: bool) -> None:
    llm = engine(_model(policy), async_scheduling=ahead, **(WHOLE if policy == "dms-quest" else {}))
    drawn = [output.outputs[0] for output in llm.generate(PROMPTS, greedy(LONG))]
    for length in (1, 2, 11, LONG):
        for long, output in zip(drawn, llm.generate(PROMPTS, greedy(length)), strict=True):
            assert long.token_ids[:length] == output.outputs[0].token_ids
            assert _history(long).at(length) == output.outputs[0].kv == _history(output.outputs[0]).at(length)


@pytest.mark.parametrize("policy", ["dms", "dms-quest"])
def test_swaps_forks_and_sessions_count_alike(policy: str) -> None:
    """Of every sample the whole prompt is read, shared or not; a short pool changes nothing."""
    model = _model(policy)
    params = SamplingParams(n=3, max_tokens=LONG, seed=0)
    ample, short = engine(model, **WHOLE), engine(model, pages=180, **WHOLE)
    outputs = ample.generate(PROMPTS, params, keep=True), short.generate(PROMPTS, params, keep=True)
    for many in outputs:
        for output in many:
            for sample in output.outputs:
                assert _history(sample).most == LONG
                assert _history(sample).at(LONG) == sample.kv
                assert _history(sample).at(1) == _history(output.outputs[0]).at(1)
    assert [[_history(s).at(9) for s in o.outputs] for o in outputs[0]] == [
        [_history(s).at(9) for s in o.outputs] for o in outputs[1]
    ]
    (turn,) = ample.generate(PROMPTS[0], greedy(6), session=outputs[0][1].session)
    assert _history(turn.outputs[0]).at(6) == turn.kv
    assert _history(turn.outputs[0]).at(1).kv_reads == 0


def test_what_ended_early_or_not_at_all() -> None:
    llm = engine(attached("dms"), async_scheduling=True)
    (output,) = llm.generate(PROMPTS[0], greedy(LONG))
    stop = output.outputs[0].token_ids[10]
    (ended,) = llm.generate(PROMPTS[0], greedy(LONG, stop_token_ids=[stop]))
    sample = ended.outputs[0]
    assert _history(sample).most == len(sample.token_ids) <= 11
    assert _history(sample).at(len(sample.token_ids)) == sample.kv
    for wrong in (0, LONG + 1):
        with pytest.raises(ValueError, match=f"{wrong} tokens of a sample of {LONG}; ask for 1 to {LONG}"):
            _history(output.outputs[0]).at(wrong)
    request = llm.engine.add(PROMPTS[0], greedy(LONG))
    assert request.output().outputs[0].kv_history is None
    llm.engine.abort(request.id)
    assert request.output().outputs[0].kv_history is None


def test_the_sum_of_what_was_held_is_what_was_read() -> None:
    """Dense, by hand: 5 tokens of a prompt, then 6, 7, ..."""
    model = attached("dense")
    (output,) = LLM(model, kv_memory="1MiB", page_size=PAGE).generate(PROMPTS[0], greedy(4))
    kv = [_history(output.outputs[0]).at(n) for n in (1, 2, 4)]
    assert [k.tokens_held for k in kv] == [k.peak_tokens for k in kv] == [5, 6, 8]
    assert [k.kv_reads for k in kv] == [0, 6, 6 + 7 + 8]
