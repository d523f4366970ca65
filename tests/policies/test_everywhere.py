"""Every policy gives the same tokens in SparseCache, in the engine, alone, in a batch, in any chunks, forked, swapped;
what a policy cannot do is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekv
from helpers import check_pages, random_heads, tiny_model, tokens
from serving import assert_empty
from sparsekv import LLM, SamplingParams, SparseCache
from sparsekv.attend import Executor
from sparsekv.modeling.attach import attachment_of

PROMPT, NEW = 45, 14
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dms": {"window": 4},
    "dms of lag 1": {"window": 4, "lag": 1},
    "dms, immediate": {"window": 4, "lag": 4},
    "streaming": {"budget": 9},
    "tova": {"budget": 9},
    "h2o": {"budget": 9},
    "random": {"budget": 9},
    "snapkv": {"budget": 37},
    "quest": {"budget": 12, "page_size": 4},
    "dms-quest": {"budget": 12, "page_size": 4, "window": 4},
}
PRUNING = ("tova", "h2o", "random", "snapkv")


def governed(name: str, **config: Any) -> Any:
    """A tiny float64 model of four layers (Quest reads two densely) under a policy; DMS keeps about half."""
    model = tiny_model(dtype=torch.float64, num_hidden_layers=4, **config)
    policy = "dms" if name.startswith("dms") and name != "dms-quest" else name
    sparsekv.attach(model, policy=policy, **OPTIONS[name])
    return random_heads(model) if name.startswith("dms") else model


def generated(model: Any, ids: Tensor, cache: SparseCache, *, new: int = NEW, **options: Any) -> list[list[int]]:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_is_its_rows_alone_with_padding_on_either_side(name: str) -> None:
    model = governed(name)
    short, long = tokens(1, PROMPT - 7, seed=1), tokens(1, PROMPT, seed=2)
    alone = [generated(model, ids, SparseCache(model)) for ids in (short, long)]
    padded = torch.cat([torch.nn.functional.pad(short, (7, 0)), long])
    cache = SparseCache(model)
    assert generated(model, padded, cache, attention_mask=(padded != 0).long()) == [*alone[0], *alone[1]]
    check_pages(cache.ragged)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_engine_gives_the_tokens_of_a_plain_generate_in_any_chunks(name: str) -> None:
    """Several requests at once, prompts cut by the budget of tokens, samples forked, rows swapped out and in."""
    model = governed(name)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (PROMPT, PROMPT - 12, PROMPT - 3)]
    expected = [generated(model, torch.tensor([p]), SparseCache(model))[0] for p in prompts]
    greedy = SamplingParams(max_tokens=NEW, temperature=0)
    # Where DMS is read by pages, chunks decide which survivors lie together: see docs/concepts.md.
    for chunk in (64,) if name == "dms-quest" else (8, 64):
        llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=chunk)
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, greedy)] == expected
        assert_empty(llm)
    need = LLM(model, max_num_seqs=1)
    (output,) = need.generate([prompts[0]], greedy)
    pool = need.engine.runner.ragged.pool
    pages = int(output.outputs[0].kv.peak_tokens * 8 / pool.page_size * 1.6) + 24
    short = LLM(model, max_num_seqs=4, kv_memory=pages * pool.page_bytes)
    short.engine.scheduler.written = 0  # so that it swaps
    assert [o.outputs[0].token_ids for o in short.generate(prompts, greedy)] == expected
    assert_empty(short)


@pytest.mark.parametrize("name", OPTIONS)
def test_reads_held_and_peak_are_those_of_the_cache_in_the_engine(name: str) -> None:
    model = governed(name)
    ids = tokens(1, PROMPT, seed=3)
    cache = SparseCache(model)
    generated(model, ids, cache)
    stats = cache.stats()
    (output,) = LLM(model).generate([ids[0].tolist()], SamplingParams(max_tokens=NEW, temperature=0))
    kv = output.outputs[0].kv
    assert kv.tokens_seen == stats.tokens_seen
    for field in ("tokens_held", "kv_reads", "bound_reads", "peak_tokens"):
        assert getattr(kv, field) == pytest.approx(getattr(stats, field)), field
    assert stats.peak_tokens >= PROMPT or name not in PRUNING
    assert sum(map(sum, stats.reads)) / 8 == pytest.approx(stats.kv_reads)
    if "budget" in OPTIONS[name] and name not in ("quest", "dms-quest", "snapkv"):
        assert max(map(max, stats.held)) == OPTIONS[name]["budget"]


@pytest.mark.parametrize("name", OPTIONS)
def test_forks_go_on_as_their_source_would(name: str) -> None:
    """Copies are exact; random's draw differs by sample, from the first token after the fork on."""
    model = governed(name)
    ids = tokens(1, PROMPT, seed=4)

    def continued(copies: int) -> list[list[int]]:
        cache = SparseCache(model)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(copies)
        check_pages(cache.ragged)
        return generated(model, ids.expand(copies, -1), cache)

    (expected,), out = continued(1), continued(3)
    assert out[0] == expected
    assert name == "random" or out[1:] == [expected] * 2


def test_samples_of_random_draw_apart_in_cache_and_engine() -> None:
    """A fork in the cache and a sample of the engine make the same draws: the same tokens, and not their source's."""
    model = governed("random")
    ids, cache = tokens(1, PROMPT, seed=4), SparseCache(model)
    with torch.no_grad():
        first = int(model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax())
    cache.batch_repeat_interleave(2)
    assert cache.ragged.samples[:-1].tolist() == [0, 1]
    rows = torch.cat([ids, torch.tensor([[first]])], dim=1).expand(2, -1)
    apart = [[first, *row] for row in generated(model, rows, cache, new=NEW - 1)]
    params = SamplingParams(n=2, max_tokens=NEW, temperature=1, top_k=1, seed=0)
    (output,) = LLM(model).generate([ids[0].tolist()], params)
    assert [sample.token_ids for sample in output.outputs] == apart
    assert apart[0] != apart[1]


@pytest.mark.parametrize("name", [*PRUNING, "quest", "dms-quest"])
def test_a_forward_without_a_cache_refuses_what_it_would_ignore(name: str) -> None:
    model = governed(name)
    with pytest.raises(ValueError, match="decides by what a cache holds, and this forward has none"):
        model(tokens(1, 5), use_cache=False)


@pytest.mark.parametrize("name", ["tova", "h2o", "random"])
def test_an_ample_budget_is_dense(name: str) -> None:
    model = tiny_model(dtype=torch.float64)
    ids = tokens(2, 30)
    sparsekv.attach(model, policy="dense")
    expected = generated(model, ids, SparseCache(model))
    sparsekv.detach(model)
    sparsekv.attach(model, policy=name, budget=60)
    assert generated(model, ids, SparseCache(model)) == expected


def test_padded_rows_of_a_graph_write_nothing() -> None:
    """A decode step with places of -1 leaves rows, pages, state and reads as the step without them does."""
    for name in OPTIONS:
        caches = []
        for rows in ([0, 1], [0, -1, 1, -1]):
            model = governed(name)
            llm = LLM(model, max_num_seqs=3, enforce_eager=True, kv_memory="1MiB")
            runner = llm.engine.runner
            executor: Executor = runner.cache.executor
            _decode_by_hand(model, executor, runner.cache, rows)
            caches.append(executor)
        first, second = (c.ragged for c in caches)
        assert torch.equal(first.lengths, second.lengths)
        assert first.pool.pages_free == second.pool.pages_free
        for a, b in zip(first.row_state, second.row_state, strict=True):
            for key in a:
                assert torch.allclose(a[key][:-1].double(), b[key][:-1].double()), (name, key)


def _decode_by_hand(model: Any, executor: Executor, cache: Any, rows: list[int]) -> None:
    from sparsekv.attend import Part
    from sparsekv.ops.layout import Batch

    ids = tokens(2, PROMPT, seed=9)
    starts = torch.tensor([0, PROMPT, 2 * PROMPT], dtype=torch.int32)
    batch = Batch(rows=torch.tensor([0, 1]), starts=starts, longest=PROMPT)
    seen = torch.zeros(2, dtype=torch.int32)
    positions = torch.arange(PROMPT).repeat(2)
    with torch.no_grad():
        cache.parts = (None, Part(batch=batch, seen=seen, tokens=2 * PROMPT, most=PROMPT))
        model(ids.view(1, -1), position_ids=positions[None], past_key_values=cache, use_cache=True)
        executor.finish_prompts(torch.tensor([0, 1]), PROMPT)
        for step in range(6):
            at = PROMPT + step
            batch = Batch(rows=torch.tensor(rows), starts=torch.arange(len(rows) + 1, dtype=torch.int32), longest=1)
            seen = torch.full((len(rows),), at, dtype=torch.int32)
            cache.parts = (Part(batch=batch, seen=seen, tokens=len(rows), most=120), None)
            new = torch.tensor([[5 + step + max(row, 0) for row in rows]])
            model(new, position_ids=torch.full_like(new, at), past_key_values=cache, use_cache=True)
    assert attachment_of(model) is not None
