"""What users do with an attached model as with any other: no cache passed, threads, copies, pickles, pipelines."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers as hf
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import sparsekv
from helpers import dms_model, random_heads, tiny_model, tokens
from sparsekv import LLM, SamplingParams, SparseCache
from sparsekv.attend import Part
from sparsekv.dms import NeuronSource
from sparsekv.engine.device.graphs import compiled_decode
from sparsekv.ops.layout import Batch
from tiny import tokenizer

NEW = 12


def neuron_model(family: str = "Qwen3"):
    model = tiny_model(family, dtype=torch.float64)
    sparsekv.attach(model, policy="dms", window=3, neuron=NeuronSource(scale=3.0))
    return model


def budget_model():
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy="tova", budget=8)
    return model


def dmc_model():
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy="dmc", neuron=NeuronSource(channel=-1, scale=3.0, offset=0.0))
    return model


MODELS = {
    "dmc": dmc_model,
    "heads": dms_model,
    "neuron": neuron_model,
    "fused neuron": lambda: neuron_model("Phi3"),
    "tova": budget_model,
}


# Threads


@pytest.mark.parametrize("kind", MODELS)
def test_generations_in_several_threads_are_each_their_own(kind):
    model = MODELS[kind]()
    prompts = [tokens(1 + i % 2, 7 + i, seed=i) for i in range(4)]

    def complete(ids):
        return model.generate(ids, max_new_tokens=NEW, past_key_values=SparseCache(model, page_size=4))

    alone = [complete(ids) for ids in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(complete, prompts))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_two_engines_on_one_attached_model():
    model = dms_model()
    engines = [LLM(model, kv_memory="1MiB", max_num_seqs=4) for _ in range(2)]
    prompts = [tokens(1, 5 + i, seed=i)[0].tolist() for i in range(6)]
    params = SamplingParams(max_tokens=NEW, temperature=0.0)

    def complete(llm):
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    alone = complete(engines[0])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(complete, engines * 2)) == [alone] * 4
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("kind", ["heads", "neuron"])
@torch.no_grad()
def test_the_model_compiles_whole(kind):
    """What a layer's hooks leave for its attention function is no break in the engine's one graph."""
    torch._dynamo.reset()
    model = MODELS[kind]()
    cache = LLM(model, kv_memory="1MiB", max_num_seqs=2).engine.runner.cache
    batch = Batch(rows=torch.arange(2), starts=torch.arange(3, dtype=torch.int32), longest=1)

    def steps(forward):
        cache.ragged.clear()
        logits = []
        for position in range(4):
            seen = torch.full((2,), position, dtype=torch.int32)
            cache.parts = (Part(batch=batch, seen=seen, tokens=2, most=position + 1), None)
            logits.append(forward(tokens(1, 2, seed=position), torch.full((1, 2), position)))
        return torch.stack(logits)

    def plain(ids, positions):
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]

    torch.testing.assert_close(steps(compiled_decode(model, cache, backend="eager")), steps(plain))


# Copies


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_a_model_of_its_own(kind):
    model, ids = MODELS[kind](), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=NEW)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        assert all(parameter is not other for other in model.parameters())
    assert torch.equal(twin.generate(ids, max_new_tokens=NEW), expected)
    sparsekv.detach(twin)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), expected)
    assert twin.generate(ids, max_new_tokens=NEW).shape == expected.shape
    assert "sparsekv" not in repr(vars(twin)) + twin.config._attn_implementation
    again = copy.deepcopy(model)
    sparsekv.detach(model)
    assert torch.equal(again.generate(ids, max_new_tokens=NEW), expected)


def test_a_pickled_model_works_in_another_process(tmp_path):
    model, ids = dms_model(), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=NEW).tolist()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        f"print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens={NEW}).tolist())\n"
        "import sparsekv; sparsekv.detach(model); print(model.config._attn_implementation)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(expected), "sdpa"]


# Without a cache


@pytest.mark.parametrize("kind", MODELS)
def test_each_call_without_a_cache_gets_a_sparse_one_of_its_own(kind):
    model, ids = MODELS[kind](), tokens(2, 9)
    explicit = SparseCache(model)
    expected = model.generate(ids, max_new_tokens=NEW, past_key_values=explicit)
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert isinstance(out.past_key_values, SparseCache)
        assert out.past_key_values is not explicit
        assert out.past_key_values.stats() == explicit.stats()
    assert explicit.columns == 9 + NEW - 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_the_dense_policy_gives_transformers_own(options):
    theirs, ours = (tiny_model(dtype=torch.float64) for _ in range(2))
    sparsekv.attach(ours, policy="dense")
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens(2, 9), max_new_tokens=NEW, **options))
    assert torch.equal(*outputs)


def test_generation_without_any_cache_is_a_mask_or_refused():
    model, ids = dms_model(window=3), tokens(1, 9)
    assert torch.equal(
        model.generate(ids, max_new_tokens=NEW, use_cache=False), model.generate(ids, max_new_tokens=NEW)
    )
    with pytest.raises(ValueError, match="policy 'tova' decides by what a cache holds, and this forward has none"):
        budget_model().generate(ids, max_new_tokens=NEW, use_cache=False)


def test_a_cache_of_transformers_own_is_refused_before_the_first_forward():
    model, ids = dms_model(), tokens(1, 9)
    with pytest.raises(ValueError, match="cannot use the cache DynamicCache: leave it out"):
        model.generate(ids, max_new_tokens=3, past_key_values=hf.DynamicCache())
    with pytest.raises(ValueError, match="cannot use the cache 'static': leave it out"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")


def test_a_cache_that_the_model_asks_for_by_default_gives_way():
    """Gemma's generation configuration names one."""
    model, ids = dms_model("Gemma3"), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=NEW)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, past_key_values=SparseCache(model)), expected)
    sparsekv.detach(model)
    assert model.generation_config.cache_implementation == "static"


def words_model(policy: str = "dms", **options):
    """With a vocabulary for the tokenizer."""
    model = tiny_model(vocab_size=512, dtype=torch.float64)
    sparsekv.attach(model, policy=policy, **(options or {"window": 3}))
    if policy == "dms":
        random_heads(model)
    return model


def test_a_pipeline():
    model, words = words_model(), tokenizer()
    pipe = hf.pipeline("text-generation", model=model, tokenizer=words)
    prompt = "The old ship sails under"
    ids = words(prompt, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=NEW, do_sample=False, past_key_values=SparseCache(model))
    for _ in range(2):
        (given,) = pipe(prompt, max_new_tokens=NEW, do_sample=False)
        assert given["generated_text"] == words.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["dms", "tova"])
def test_lm_evaluation_harness(policy):
    """Its `hf` model generates for every policy and scores for those whose rule is a mask."""
    model = words_model() if policy == "dms" else words_model("tova", budget=8)
    words = tokenizer()
    words.pad_token = words.eos_token
    lm = HFLM(pretrained=model, tokenizer=words, batch_size=2)
    prompts = ["The old ship sails", "A river turns slowly under the green"]
    settings = {"until": ["zzz"], "max_gen_toks": NEW, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    for given, prompt in zip(lm.generate_until(asked, disable_tqdm=True), prompts, strict=True):
        ids = words(prompt, return_tensors="pt")["input_ids"]
        cache = SparseCache(model)
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
        assert given == words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    scored = [Instance("loglikelihood", {}, (prompt, " the mountain"), i) for i, prompt in enumerate(prompts)]
    if policy == "dms":
        assert all(value < 0 for value, _ in lm.loglikelihood(scored, disable_tqdm=True))
    else:
        with pytest.raises(ValueError, match="this forward has none"):
            lm.loglikelihood(scored, disable_tqdm=True)


def test_reinforcement_learning_generates_and_trains_in_turns():
    """As TRL does: samples in training mode without gradients, then the loss of their log probabilities, checkpointed,
    through PEFT's LoRA."""
    model = tiny_model()
    sparsekv.attach(model, policy="dms", window=3)
    random_heads(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.enable_input_require_grads()
    wrapped.train()
    for _ in range(2):
        with torch.no_grad():
            samples = wrapped.generate(input_ids=tokens(2, 9), max_new_tokens=NEW, do_sample=True)
        assert samples.shape == (2, 9 + NEW)
        wrapped(samples, use_cache=False).logits.log_softmax(-1).amax(-1).mean().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
