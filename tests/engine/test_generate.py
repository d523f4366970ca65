"""The engine's tokens are plain generate's, whatever shares the batch, however prompts are cut."""

from dataclasses import replace

import pytest

import sparsekv
from helpers import FAMILIES, random_heads, tiny_model
from serving import alone, assert_empty, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.modeling.adapter import AdapterConfig, base_shape, save_adapter, write_config

LENGTHS = (5, 37, 16, 1, 9, 22)


@pytest.mark.parametrize("policy", ["dense", "dms", "lagged", "streaming"])
@pytest.mark.parametrize("ahead", [False, True])
def test_greedy_is_plain_generate(policy: str, ahead: bool) -> None:
    model, many = attached(policy), prompts(*LENGTHS)
    llm = engine(model, async_scheduling=ahead)
    params = [greedy(n) for n in (12, 4, 9, 12, 1, 7)]
    outputs = llm.generate(many, params)
    for prompt, each, output in zip(many, params, outputs, strict=True):
        assert output.outputs[0].token_ids == alone(model, prompt, each.max_tokens or 0)
        assert output.outputs[0].finish_reason == "length"
        assert output.finished
        assert output.prompt_token_ids == prompt
    assert_empty(llm)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"Llama"}))
def test_families(family: str) -> None:
    model, many = attached("dms", family), prompts(11, 3, 20)
    for prompt, output in zip(many, engine(model).generate(many, greedy(8)), strict=True):
        assert output.outputs[0].token_ids == alone(model, prompt, 8)


@pytest.mark.parametrize("budget", [2, 3, 7, 64])
def test_any_chunk_budget(budget: int) -> None:
    model, many = attached("dms"), prompts(19, 6, 30)
    llm = engine(model, max_num_seqs=2, max_num_batched_tokens=budget)
    assert [o.outputs[0].token_ids for o in llm.generate(many, greedy(6))] == [alone(model, p, 6) for p in many]


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("ahead", [False, True])
def test_samples_of_one_prompt_are_those_of_the_prompt_alone(rows: int, ahead: bool) -> None:
    """n = 5 forks, also where only two rows exist: greedy samples all equal plain generate."""
    model = attached("dms")
    (prompt,) = prompts(23)
    llm = engine(model, max_num_seqs=rows, async_scheduling=ahead)
    (output,) = llm.generate(prompt, greedy(10, n=5))
    assert [c.token_ids for c in output.outputs] == [alone(model, prompt, 10)] * 5
    assert [c.index for c in output.outputs] == list(range(5))
    assert_empty(llm)


def test_a_prompt_of_many_samples_is_prefilled_once() -> None:
    llm = engine(attached("dms"), max_num_seqs=8, max_num_batched_tokens=64)
    placed = []
    original = llm.engine.runner.execute
    llm.engine.runner.execute = lambda step: placed.extend(c.count for c in step.chunks) or original(step)  # type: ignore[method-assign]
    llm.generate(prompts(30), SamplingParams(n=6, max_tokens=3, seed=1))
    assert placed == [30]


def test_statistics_are_those_of_the_cache() -> None:
    """Dense: seen = held, and the reads are the triangle of the decode steps."""
    llm = engine(attached("dense"))
    (output,) = llm.generate(prompts(10), greedy(5))
    assert output.kv.tokens_seen == output.kv.tokens_held == output.kv.peak_tokens == 14
    assert output.kv.compression_ratio == 1
    assert output.kv.kv_reads == 11 + 12 + 13 + 14
    (output,) = engine(attached("dms")).generate(prompts(60), greedy(20))
    assert output.kv.compression_ratio > 1.3


def test_the_dial_turns_between_steps() -> None:
    model = attached("dms")
    llm = engine(model)
    (prompt,) = prompts(60)
    ratios = []
    for offset in (float("-inf"), 0.0, float("inf")):
        llm.offset = offset
        assert llm.offset == offset
        ratios.append(llm.generate(prompt, greedy(10))[0].kv.compression_ratio)
    assert ratios[0] == 1 < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(69 / 4)


def test_an_ended_text_stops_and_the_rest_goes_on() -> None:
    model, many = attached("dms"), prompts(8, 12)
    expected = alone(model, many[0], 10)
    for ahead in (False, True):
        llm = engine(model, async_scheduling=ahead)
        first, second = llm.generate(many, [greedy(10, stop_token_ids=[expected[3]]), greedy(10)])
        end = expected.index(expected[3]) + 1
        assert first.outputs[0].token_ids == expected[:end]
        assert (first.outputs[0].finish_reason, first.outputs[0].stop_reason) == ("stop", expected[3])
        assert second.outputs[0].token_ids == alone(model, many[1], 10)
        assert_empty(llm)


def test_the_dial_turns_by_ratio_where_an_adapter_says_which_offset_that_is(tmp_path) -> None:
    model = tiny_model()
    sparsekv.attach(model, policy="dms", window=4)
    random_heads(model)
    config = AdapterConfig(
        base_model_name_or_path="tiny", base_shape=base_shape(model), window=4, offsets=[(-2.0, 2.0), (1.0, 4.0)]
    )
    save_adapter(model, tmp_path / "adapter", config)
    sparsekv.detach(model)
    llm = LLM(model, adapter=str(tmp_path / "adapter"), cr=4)
    assert llm.offset == 1
    llm.set_cr(3)
    assert llm.offset == -0.5
    llm.set_cr(1)
    assert llm.offset == float("-inf")
    write_config(tmp_path / "adapter", replace(config, calibration={"length": 64}, ratios={"256": [3.0, 8.0]}))
    sparsekv.detach(model)
    llm = LLM(model, adapter=str(tmp_path / "adapter"), cr=3, tokens=256)
    assert llm.offset == -2
    llm.set_cr(8, tokens=256)
    assert llm.offset == 1
    with pytest.raises(ValueError, match="holds up to 4"):
        llm.set_cr(9)
    with pytest.raises(ValueError, match="make the LLM with adapter"):
        LLM(tiny_model(), policy="dense").set_cr(2)
