"""LLM's calls as vLLM's users know them: prompts, progress, chat options, times, biases."""

import time
from typing import Any

import pytest
import torch

import sparsekv
import tiny
from helpers import random_heads, tiny_model
from serving import alone, assert_empty, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams, SparseCache
from sparsekv.engine.schedule import scheduler
from sparsekv.modeling.adapter import AdapterConfig, base_shape, save_adapter


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def llm(tokenizer: Any) -> LLM:
    return engine(attached("dms", vocab_size=len(tokenizer)), tokenizer=tokenizer)


def test_prompts_by_name(llm: LLM, tokenizer: Any) -> None:
    ids = tokenizer.encode("the river")
    outputs = llm.generate(["the river", ids, {"prompt": "the river"}, {"prompt_token_ids": ids}], greedy(5))
    assert [o.prompt_token_ids for o in outputs] == [ids] * 4
    assert [o.prompt for o in outputs] == ["the river", None, "the river", None]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    (single,) = llm.generate({"prompt": "the river"}, greedy(5))
    assert single.outputs[0].text == outputs[0].outputs[0].text
    for wrong in ({}, {"text": "x"}, {"prompt": "x", "image": 1}):
        with pytest.raises(ValueError, match="'prompt_token_ids'"):
            llm.generate([wrong], greedy(1))
    with pytest.raises(ValueError, match="sampling_params is a dict"):
        llm.generate("the river", {"n": 1})  # type: ignore[arg-type]


def test_progress(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["the river", "a ship"], greedy(4))
    assert capsys.readouterr().err == ""
    llm.generate(["the river", "a ship"], greedy(4), use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tokens/s out" in shown


def test_no_text_where_none_is_wanted(llm: LLM) -> None:
    (with_text,), (without,) = (llm.generate("the", greedy(6, detokenize=d)) for d in (True, False))
    assert with_text.outputs[0].token_ids == without.outputs[0].token_ids
    assert with_text.outputs[0].text
    assert without.outputs[0].text == ""


def test_a_bias_moves_the_choice_and_nothing_else() -> None:
    model, many = attached("dms"), prompts(8, 12, 5)
    llm = engine(model)
    plain = [alone(model, prompt, 6) for prompt in many]
    forced, banned, none = llm.generate(
        many,
        [greedy(6, logit_bias={3: 1e4}), greedy(6, logit_bias=dict.fromkeys(plain[1], -1e4), logprobs=1), greedy(6)],
    )
    assert forced.outputs[0].token_ids == [3] * 6
    assert not set(banned.outputs[0].token_ids) & set(plain[1])
    assert none.outputs[0].token_ids == plain[2]
    first = banned.outputs[0].logprobs[0]  # type: ignore[index]
    assert first[plain[1][0]].rank == 1  # of the model's own distribution
    (samples,) = llm.generate(many[0], SamplingParams(n=3, max_tokens=4, seed=0, logit_bias={5: 1e4}))
    assert [c.token_ids for c in samples.outputs] == [[5] * 4] * 3
    with pytest.raises(ValueError, match="logit_bias holds 61"):
        llm.generate(many[0], greedy(1, logit_bias={61: 1.0}))
    assert_empty(llm)


def test_nearly_no_temperature_is_greedy() -> None:
    model, (a, b) = attached("dms"), prompts(8, 12)
    cold = SamplingParams(max_tokens=8, temperature=1e-38, top_p=0.9)
    outputs = engine(model).generate([a, b], [cold, SamplingParams(max_tokens=8, seed=0)])
    assert outputs[0].outputs[0].token_ids == alone(model, a, 8)


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_are_scored_as_one_forward_scores_them(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks beside decodes, with and without samples; the first token has nothing before it."""
    monkeypatch.setattr(scheduler, "SCORED", 9)
    model, many = attached("dms"), prompts(23, 7, 1, 40)
    llm = engine(model, async_scheduling=ahead)
    params = [greedy(5, prompt_logprobs=2), greedy(9), greedy(5, prompt_logprobs=0, n=3), greedy(3, prompt_logprobs=4)]
    outputs = llm.generate(many, params)
    assert [o.outputs[0].token_ids for o in outputs] == [
        alone(model, prompt, each.max_tokens or 0) for prompt, each in zip(many, params, strict=True)
    ]
    assert outputs[1].prompt_logprobs is None
    assert outputs[2].prompt_logprobs == [None]
    for output, count in ((outputs[0], 2), (outputs[3], 4)):
        ids, found = output.prompt_token_ids, output.prompt_logprobs
        with torch.no_grad():
            logits = model(torch.tensor([ids]), past_key_values=SparseCache(model)).logits[0]
        expected = logits.log_softmax(-1)
        assert found is not None
        assert found[0] is None
        assert len(found) == len(ids)
        for position, entry in enumerate(found[1:], 1):
            row = expected[position - 1]
            assert entry is not None
            assert entry[ids[position]].logprob == pytest.approx(float(row[ids[position]]), abs=1e-9)
            assert set(row.topk(count).indices.tolist()) <= set(entry)
            assert entry[ids[position]].rank == int((row > row[ids[position]]).sum()) + 1
    assert_empty(llm)


def test_a_continued_text_is_not_scored() -> None:
    llm = engine(attached("dms"))
    (first,) = llm.generate(prompts(5), greedy(2), keep=True)
    with pytest.raises(ValueError, match="prompt_logprobs needs the whole prompt"):
        llm.generate(prompts(3), greedy(2, prompt_logprobs=0), session=first.session)


def test_times() -> None:
    llm = engine(attached("dms"), max_num_seqs=1)
    before = time.time()
    for output in llm.generate(prompts(5, 9), greedy(4)):
        m: Any = output.metrics
        times = (before, m.arrival_time, m.first_scheduled_time, m.first_token_time, m.last_token_time, m.finished_time)
        assert list(times) == sorted(times)
        assert m.first_token_time < m.last_token_time
        assert m.time_in_queue == m.first_scheduled_time - m.arrival_time
    assert m.first_scheduled_time > output.metrics.arrival_time  # type: ignore[union-attr]


def test_what_the_template_knows(llm: LLM, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "the ship"}]
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{{ tools[0].name if tools }}{{ mood }}" + kept
    try:
        (output,) = llm.chat(messages, greedy(2), tools=[{"name": "oar"}], chat_template_kwargs={"mood": "old"})
        assert tokenizer.decode(output.prompt_token_ids).startswith("oarold<|user|>the ship")
        ids = llm.chat_prompt(messages, chat_template_kwargs={"add_generation_prompt": False})
        assert not tokenizer.decode(ids).endswith("<|assistant|>")
    finally:
        tokenizer.chat_template = kept


def test_max_cr(tmp_path: Any) -> None:
    model = tiny_model()
    sparsekv.attach(model, policy="dms", window=4)
    random_heads(model)
    config = AdapterConfig(
        base_model_name_or_path="tiny", base_shape=base_shape(model), window=4, offsets=[(-2.0, 2.0), (1.0, 4.0)]
    )
    save_adapter(model, tmp_path / "adapter", config)
    sparsekv.detach(model)
    assert LLM(model, adapter=str(tmp_path / "adapter")).max_cr == 4
    with pytest.raises(ValueError, match="adapter"):
        _ = LLM(tiny_model(), policy="dense").max_cr
