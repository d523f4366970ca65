"""vLLM with the plugin says what sparsekv.LLM says, token for token: one engine a family, many requests.

The pool holds little more than one whole sequence, so that requests are preempted all the time.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sparsekv
from engines import arrivals_and_aborts, engine, greedy, manager, nothing_is_left, recorded, scheduler, texts
from models import VOCABULARY
from sparsekv.integrations.vllm.worker.rows import SHORTAGE

BLOCKS = 10
"""One for vLLM's padding, eight for 256 tokens, one to spare."""


def expected(made: Any, **params: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in made.answers(**params)]


def watch_free(llm: Any) -> list[int]:
    """Free blocks after each report, as they come."""
    found, seen = manager(llm), list[int]()
    settle = found.settle

    def settled(*args: Any) -> None:
        settle(*args)
        seen.append(found.block_pool.get_num_free_blocks())

    found.settle = settled
    return seen


def test_llama_in_a_pool_that_is_too_small(made):
    llama = made("Llama")
    answers = llama.answers()
    assert 2 < sum(a.kv.tokens_seen for a in answers) / sum(a.kv.tokens_held for a in answers) < 4.5
    want = [list(a.outputs[0].token_ids) for a in answers]
    with engine(llama, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=512) as llm:
        free = watch_free(llm)
        assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want
        assert nothing_is_left(llm)
        assert manager(llm).waits > 0 and min(free) < 3  # requests did wait for pages

        for chunk in (16, 23, 64):
            scheduler(llm).max_num_scheduled_tokens = chunk
            assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want, chunk
            assert nothing_is_left(llm)
        scheduler(llm).max_num_scheduled_tokens = 48

        with recorded():
            arrivals_and_aborts(llm, llama, want, seed=3)
        n_samples(llm, llama, want)
        stop_strings(llm, llama)
        for seed in range(3):
            arrivals_and_aborts(llm, llama, want, seed=seed)


def test_a_prompt_that_is_longer_than_the_cache_is_densely(made):
    llama = made("Llama")
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(tokens)] for tokens in (700, 600)]
    want = [list(a.outputs[0].token_ids) for a in llama.answers(prompts)]
    method = {"adapter": llama.adapter, "trusted_ratio": 2.0}
    with engine(llama, method=method, max_model_len=760, num_gpu_blocks_override=18, max_num_batched_tokens=48) as llm:
        assert manager(llm).blocks * 32 < len(prompts[1])
        assert [x for (x,) in texts(llm, prompts, greedy())] == want
        assert nothing_is_left(llm)


def test_a_wrong_account_stops_the_engine(made):
    """A sentence, and no token."""
    llama, folder = made("Llama"), Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(folder / "starved.py"), llama.model, llama.adapter]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "answers" not in done.stdout
    assert SHORTAGE in done.stderr


def n_samples(llm: Any, made: Any, want: list[list[int]]) -> None:
    """top_k = 1 is greedy, and vLLM allows no samples of greedy itself."""
    params = greedy(n=4, temperature=1.0, top_k=1)
    got = texts(llm, made.prompts[2:6], params)
    assert got == [[answer] * 4 for answer in want[2:6]]
    assert nothing_is_left(llm)


def stop_strings(llm: Any, made: Any) -> None:
    whole = [output.outputs[0].text for output in made.answers()]
    stops = [text[len(text) // 2 : len(text) // 2 + 3] for text in whole]
    want = [made.answers([p], stop=[s])[0].outputs[0] for p, s in zip(made.prompts, stops, strict=True)]
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in made.prompts], [greedy(stop=[s]) for s in stops], use_tqdm=False
    )
    got = [o.outputs[0] for o in outputs]
    assert [(list(g.token_ids), g.stop_reason) for g in got] == [(w.token_ids, w.stop_reason) for w in want]
    assert any(len(w.token_ids) < 40 for w in want)
    assert nothing_is_left(llm)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Qwen3", {"enforce_eager": False}),
        ("Mistral", {"model_impl": "transformers"}),
        ("Qwen3Moe", {}),
    ],
    ids=["Qwen3 compiled", "Mistral by Transformers", "Qwen3Moe"],
)
def test_families(made, family, options):
    found = made(family)
    want = expected(found)  # first: vLLM's Transformers backend changes Transformers' own classes
    with engine(found, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=48, **options) as llm:
        assert [x for (x,) in texts(llm, found.prompts, greedy())] == want
        assert nothing_is_left(llm)


@pytest.mark.parametrize(
    ("family", "options", "arguments"),
    [("Llama", {}, {}), ("Qwen3", {"neuron": True}, {}), ("Llama", {"neuron": True}, {"enforce_eager": False})],
    ids=["heads", "neuron behind a norm", "neuron compiled"],
)
def test_lag_one(made, family, options, arguments):
    """As NVIDIA's checkpoints decide, whose queries carry the logits."""
    found = made(family, lag=1, **options)
    want = expected(found)
    assert want != expected(made(family))
    with engine(found, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=48, **arguments) as llm:
        assert [x for (x,) in texts(llm, found.prompts, greedy())] == want
        with recorded():
            assert [x for (x,) in texts(llm, found.prompts, greedy())] == want
        assert nothing_is_left(llm)


def test_streaming(made):
    """The second policy: no adapter, the same for all heads."""
    found, params = made("Llama"), {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    method = {"policy": "streaming", "budget": 24, "sinks": 3}
    model = AutoModelForCausalLM.from_pretrained(found.model, dtype="float32").eval()
    with sparsekv.LLM(model, kv_memory="64MiB", **method) as reference:
        outputs = reference.generate(found.prompts, sparsekv.SamplingParams(**params))
    want = [list(output.outputs[0].token_ids) for output in outputs]
    with engine(found, method=method, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=48) as llm:
        assert [x for (x,) in texts(llm, found.prompts, greedy())] == want
        with recorded():
            assert [x for (x,) in texts(llm, found.prompts, greedy())] == want
        assert nothing_is_left(llm)
