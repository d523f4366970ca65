"""What the engine's tests share: small engines over tiny models, and each request run alone."""

from typing import Any

import torch

import sparsekv
from helpers import VOCABULARY, dms_model, random_heads, tiny_model
from sparsekv import LLM, SamplingParams, SparseCache

PAGE = 4


def attached(policy: str = "dms", family: str = "Llama", **options: Any) -> Any:
    """A tiny float64 model: "dense", "dms" (random heads, window 4), "lagged" or "streaming"."""
    if policy in ("dms", "lagged"):
        return dms_model(family, lag=int(policy == "lagged"), **options)
    model = tiny_model(family, dtype=torch.float64, **options)
    sparsekv.attach(model, policy=policy, **({"budget": 12} if policy == "streaming" else {}))
    return model


def engine(model: Any, *, pages: int | None = None, **options: Any) -> LLM:
    """An LLM over an attached model, with `pages` pages (None = ample), which expects sequences to end at once: a pool
    that is too small is filled, and swapped."""
    page_bytes = 2 * PAGE * 8 * 8
    options = {"page_size": PAGE, "max_num_seqs": 4, "max_num_batched_tokens": 16} | options
    llm = LLM(model, kv_memory=(pages or 10**6) * page_bytes, **options)
    llm.engine.scheduler.written = 0
    return llm


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def greedy(tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, **options)


def alone(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Plain Transformers `generate` on SparseCache: the greedy continuation."""
    ids = torch.tensor([prompt])
    cache = SparseCache(model, page_size=PAGE)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def assert_empty(llm: LLM) -> None:
    """Every page is free, once, and nothing is remembered of any request."""
    engine = llm.engine
    ragged, scheduler = engine.runner.ragged, engine.scheduler
    assert ragged.pool.pages_in_use == 0
    assert sorted(ragged.pool.free[:-1].tolist()) == list(range(ragged.pool.pages))
    assert not ragged.pool.extra_owners.any()
    assert not ragged.lengths.any()
    assert scheduler.ledger.available() == scheduler.ledger.free == ragged.pool.pages
    assert not (scheduler.waiting or scheduler.running or scheduler.swapped or engine.requests)
    assert sorted(scheduler.free_rows) == list(range(ragged.rows))


__all__ = ["PAGE", "alone", "assert_empty", "attached", "engine", "greedy", "prompts", "random_heads"]
