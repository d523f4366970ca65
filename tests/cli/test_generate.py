"""generate: the engine's text, samples that share one prefill, statistics of what is really held."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekv
from commands import CHAT, TEXT, save_model
from sparsekv.cli.generate import Sampling, generate, prompt_ids
from sparsekv.evals.methods.setting import Setting

PROMPT = TEXT * 2
DENSE = Setting()


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
    plain = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    result = generate(model, tokenizer, ids, setting=DENSE, sampling=Sampling(max_tokens=8))
    assert result.texts == tokenizer.batch_decode(plain[:, len(ids) :], skip_special_tokens=True)
    assert result.kv.compression_ratio == 1


@pytest.mark.parametrize("prompt", [PROMPT, "T"])
def test_samples_share_one_prefill_and_differ(loaded, adapter_folder, prompt):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, prompt, chat=False)
    fed: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kw: fed.append(kw["input_ids"].numel()), with_kwargs=True
    )
    setting = Setting(policy="dms", adapter=str(adapter_folder), cr=3)
    sampling = Sampling(n=3, max_tokens=6, temperature=1.0, seed=1)
    result = generate(model, tokenizer, ids, setting=setting, sampling=sampling)
    hook.remove()
    assert len(set(result.texts)) == 3
    assert result.kv.tokens_seen == 3 * (len(ids) + 5)
    assert sum(map(sum, result.held)) == pytest.approx(4 * result.kv.tokens_held)
    assert fed == [len(ids), *[3] * 5]
    sparsekv.detach(model)
    assert generate(model, tokenizer, ids, setting=setting, sampling=sampling).texts == result.texts


def test_cold_samples_say_what_the_greedy_one_says(loaded, adapter_folder):
    model, tokenizer = loaded
    setting = Setting(policy="dms", adapter=str(adapter_folder), cr=3)
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    greedy = generate(model, tokenizer, ids, setting=setting, sampling=Sampling(max_tokens=8))
    sparsekv.detach(model)
    cold = generate(model, tokenizer, ids, setting=setting, sampling=Sampling(n=2, max_tokens=8, temperature=1e-6))
    assert cold.texts == greedy.texts * 2


def test_a_ratio_is_meant_for_the_length_that_is_said(run, model_folder):
    common = ("generate", model_folder, "--prompt", PROMPT, "--policy", "tova", "--max-tokens", 6, "--json")
    record = json.loads(run(*common, "--cr", 4, "--length", 40).out)
    assert record["kv"]["tokens_held"] == 10
    outcome = run(*common, "--budget", 10, "--length", 40)
    assert (outcome.code, "1 or more, that --cr is meant for" in outcome.err) == (2, True)


def test_a_ratio_makes_the_budget_out_of_prompt_and_output(run, model_folder):
    outcome = run(
        *("generate", model_folder, "--prompt", PROMPT, "--policy", "tova", "--cr", 4, "--max-tokens", 6, "--json")
    )
    record = json.loads(outcome.out)
    assert record["kv"]["tokens_held"] == -(-(record["prompt_tokens"] + 6) // 4)
    assert record["kv"]["bytes"] > 0


def test_a_text_ends_at_the_end_token(loaded):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
    assert generate(model, tokenizer, ids, setting=DENSE, sampling=Sampling(max_tokens=9)).tokens == 1


def test_the_chat_template_is_the_default_where_there_is_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, chat=True))
    assert tokenizer.chat_template == CHAT
    assert tokenizer.decode(prompt_ids(tokenizer, "The code", chat=None)) == "<user>The code<assistant>"
    assert tokenizer.decode(prompt_ids(tokenizer, "The code", chat=False)) == "The code"
