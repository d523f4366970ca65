"""generate: plain Transformers text, samples that fork one prefill, statistics of what is really held."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekv
from commands import CHAT, TEXT, save_model
from sparsekv.cli.generate import Sampling, generate, prompt_ids

PROMPT = TEXT * 2


@pytest.fixture
def loaded(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)


def test_json_holds_texts_and_what_the_cache_holds(run, model_folder, adapter_folder):
    outcome = run(
        *("generate", model_folder, "--prompt", PROMPT, "--adapter", adapter_folder, "--cr", 4),
        *("--max-tokens", 6, "--json"),
    )
    assert outcome.code == 0
    assert outcome.err == ""
    record = json.loads(outcome.out)
    kv = record["kv"]
    assert set(record) == {"model", "texts", "kv", "prompt_tokens", "tokens", "seconds", "tokens_per_second"}
    assert record["model"] == str(model_folder)
    assert len(record["texts"]) == 1
    assert record["tokens"] == 6
    assert kv["tokens_seen"] == record["prompt_tokens"] + 5
    assert kv["compression_ratio"] == pytest.approx(kv["tokens_seen"] / kv["tokens_held"])
    assert kv["compression_ratio"] > 1.5
    assert record["tokens_per_second"] == pytest.approx(6 / record["seconds"])


def test_without_json_the_text_alone_is_on_stdout(run, model_folder):
    outcome = run("generate", model_folder, "--prompt", PROMPT, "--max-tokens", 5)
    record = json.loads(run("generate", model_folder, "--prompt", PROMPT, "--max-tokens", 5, "--json").out)
    assert outcome.out == record["texts"][0] + "\n"
    assert "ratio 1.00" in outcome.err


def test_a_dense_policy_says_what_plain_transformers_says(loaded):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, PROMPT, chat=None)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    sparsekv.attach(model, policy="dense")
    result = generate(model, tokenizer, ids, sampling=Sampling(max_tokens=8))
    assert result.texts == tokenizer.batch_decode(plain[:, ids.shape[1] :], skip_special_tokens=True)
    assert result.kv.compression_ratio == 1


@pytest.mark.parametrize("prompt", [PROMPT, "T"])
def test_samples_fork_one_prefill_and_differ(loaded, adapter_folder, prompt):
    model, tokenizer = loaded
    sparsekv.attach(model, adapter=str(adapter_folder), cr=3)
    ids = prompt_ids(tokenizer, prompt, chat=False)
    shapes: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    sampling = Sampling(n=3, max_tokens=6, temperature=1.0, seed=1)
    result = generate(model, tokenizer, ids, sampling=sampling)
    assert len(set(result.texts)) == 3
    assert result.kv.tokens_seen == 3 * (ids.shape[1] + 5)
    assert shapes[0] == ((1, ids.shape[1] - 1) if ids.shape[1] > 1 else (3, 1))
    assert set(shapes[1:]) == {(3, 1)}
    assert generate(model, tokenizer, ids, sampling=sampling).texts == result.texts


def test_sampled_logits_after_a_fork_are_those_of_the_whole_prompt(loaded, adapter_folder):
    """Temperature near 0 is greedy, so that the forked samples must all say what one greedy run says."""
    model, tokenizer = loaded
    sparsekv.attach(model, adapter=str(adapter_folder), cr=3)
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    greedy = generate(model, tokenizer, ids, sampling=Sampling(max_tokens=8))
    cold = generate(model, tokenizer, ids, sampling=Sampling(n=2, max_tokens=8, temperature=1e-6))
    assert cold.texts == greedy.texts * 2


def test_a_text_ends_at_the_end_token(loaded):
    model, tokenizer = loaded
    sparsekv.attach(model, policy="dense")
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    first = generate(model, tokenizer, ids, sampling=Sampling(max_tokens=1))
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(ids, use_cache=False).logits[0, -1].argmax())
    result = generate(model, tokenizer, ids, sampling=Sampling(max_tokens=9))
    assert (result.tokens, first.tokens) == (1, 1)


def test_the_chat_template_is_the_default_where_there_is_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, chat=True))
    assert tokenizer.chat_template == CHAT
    assert tokenizer.decode(prompt_ids(tokenizer, "The code", chat=None)[0]) == "<user>The code<assistant>"
    assert tokenizer.decode(prompt_ids(tokenizer, "The code", chat=False)[0]) == "The code"
