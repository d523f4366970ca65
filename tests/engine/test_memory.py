"""Memory that cannot fail: full pools, swaps, refusals, cancellation, sessions."""

import pytest
import torch

from serving import alone, assert_empty, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.schedule.scheduler import SwapIn, SwapOut


def _swaps(llm: LLM) -> list[type]:
    """Records the swaps that the scheduler asks for."""
    seen: list[type] = []
    original = llm.engine.scheduler.decide

    def decide(**options: bool):
        action = original(**options)
        if isinstance(action, SwapIn | SwapOut):
            seen.append(type(action))
        return action

    llm.engine.scheduler.decide = decide  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("policy", ["dense", "dms", "lagged"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_short_pool_swaps_and_changes_nothing(policy: str, ahead: bool) -> None:
    model, many = attached(policy), prompts(9, 14, 5, 11)
    llm = engine(model, pages=64, async_scheduling=ahead)
    swaps = _swaps(llm)
    outputs = llm.generate(many, greedy(30))
    assert [o.outputs[0].token_ids for o in outputs] == [alone(model, p, 30) for p in many]
    assert SwapOut in swaps
    assert SwapIn in swaps
    assert_empty(llm)


def test_a_pool_exactly_full() -> None:
    """8 prompt tokens + 8 new ones, of which 15 are placed: 4 pages for each of 4 heads, twice, is all there is."""
    model, many = attached("dense"), prompts(8, 8)
    llm = engine(model, pages=32)
    free = []
    original = llm.engine.runner.execute

    def execute(step):
        pending = original(step)
        free.append(llm.engine.runner.ragged.pool.pages_free)
        return pending

    llm.engine.runner.execute = execute  # type: ignore[method-assign]
    outputs = llm.generate(many, greedy(8))
    assert [o.outputs[0].token_ids for o in outputs] == [alone(model, p, 8) for p in many]
    assert min(free) == 0
    assert_empty(llm)


def test_what_can_never_fit_is_refused_at_once() -> None:
    llm = engine(attached("dense"), pages=16)
    with pytest.raises(ValueError, match=r"needs about 10 KiB of KV memory and the pool has 8 KiB") as error:
        llm.generate(prompts(10), greedy(8))
    assert "kv_memory" in str(error.value)
    assert not llm.engine.has_work
    assert len(llm.generate(prompts(10), greedy(7))[0].outputs[0].token_ids) == 7


def test_nothing_runs_where_one_prompt_is_refused() -> None:
    llm = engine(attached("dense"), pages=16)
    with pytest.raises(ValueError, match="KV memory"):
        llm.generate(prompts(3, 60), greedy(4))
    assert_empty(llm)


def test_an_optimistic_ratio_ends_early_and_never_fails() -> None:
    """Expected at ratio 8 but held densely: the lone sequence ends with what fits."""
    llm = engine(attached("dense"), pages=32)
    llm.engine.scheduler.best_ratio = llm.engine.scheduler.ratio = 8.0
    first, second = llm.generate(prompts(20, 60), greedy(100))
    assert (first.outputs[0].finish_reason, first.outputs[0].stop_reason) == ("length", "kv_memory")
    assert len(first.outputs[0].token_ids) == 13
    assert second.outputs[0].token_ids == []
    assert_empty(llm)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cancelled_request_frees_its_pages_in_the_same_step(ahead: bool) -> None:
    model, many = attached("dms"), prompts(9, 30)
    llm = engine(model, async_scheduling=ahead)
    kept = llm.engine.add(many[0], greedy(20))
    gone = llm.engine.add(many[1], SamplingParams(n=3, max_tokens=50, seed=0))
    for _ in range(6):
        llm.engine.step()
    ragged = llm.engine.runner.ragged
    rows = {s.row for s in gone.sequences if s.row is not None}
    assert len(rows) == 3
    llm.engine.abort(gone.id)
    assert not ragged.lengths[:, list(rows)].any()
    assert ragged.pool.pages_in_use == int(-(-ragged.lengths // 4).sum())
    while llm.engine.has_work:
        llm.engine.step()
    assert kept.output().outputs[0].token_ids == alone(model, many[0], 20)
    assert {c.finish_reason for c in gone.output().outputs} == {"abort"}
    assert_empty(llm)


@pytest.mark.parametrize("policy", ["dense", "dms", "lagged"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_session_goes_on_exactly(policy: str, ahead: bool) -> None:
    """Two turns with a session equal one run over everything said; the first turn can be continued twice."""
    model = attached(policy)
    first, second, other = prompts(13, 6, 9)
    llm = engine(model, async_scheduling=ahead)
    (a,) = llm.generate(first, greedy(7), keep=True)
    for turn in (second, other):
        (b,) = llm.generate(turn, greedy(9), session=a.session)
        assert b.prompt_token_ids == first + a.outputs[0].token_ids + turn
        assert b.outputs[0].token_ids == alone(model, b.prompt_token_ids, 9)
    (c,) = llm.generate(second, greedy(5, n=3), session=a.session)
    assert [x.token_ids for x in c.outputs] == [b_ := alone(model, c.prompt_token_ids, 5), b_, b_]
    assert_empty(llm)


def test_a_session_after_an_end_found_late() -> None:
    model = attached("dms")
    first, second = prompts(13, 6)
    stop = alone(model, first, 5)[4]
    llm = engine(model, async_scheduling=True)
    (a,) = llm.generate(first, greedy(20, stop_token_ids=[stop]), keep=True)
    (b,) = llm.generate(second, greedy(9), session=a.session)
    assert b.outputs[0].token_ids == alone(model, first + a.outputs[0].token_ids + second, 9)
    assert_empty(llm)


def test_a_foreign_session_is_refused() -> None:
    model = attached("dense")
    (a,) = engine(model).generate(prompts(4), greedy(2), keep=True)
    with pytest.raises(ValueError, match="another LLM"):
        engine(model).generate(prompts(4), greedy(2), session=a.session)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": "lots"}, "not a size of memory"),
        ({"kv_memory": 1}, "holds no page"),
        ({"kv_memory": 1.5}, "fraction"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 4}, "max_num_batched_tokens 3"),
        ({"max_model_len": 4096}, "context is 256"),
    ],
)
def test_bad_sizes(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM(attached("dense"), **options)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), ([61], "token ids are integers"), ([1.5], "token ids are integers"), ([1] * 256, "context is 256")],
)
def test_bad_prompts(prompt: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine(attached("dense")).engine.add(prompt, greedy(1))


def test_no_page_is_written_beyond_the_tables() -> None:
    """A sequence may fill the context to the last token."""
    model = attached("dense", max_position_embeddings=32)
    (output,) = engine(model).generate(prompts(20), SamplingParams(max_tokens=None, temperature=0))
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"
    assert torch.tensor(output.outputs[0].token_ids).max() < 61
