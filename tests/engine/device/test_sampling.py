"""Sampling: the right distribution, and numbers that depend on (seed, sample, position) alone."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serving import attached, engine, greedy, prompts
from sparsekv import SamplingParams
from sparsekv.engine.device.history import TokenHistory
from sparsekv.engine.device.sampler import SamplingBatch, sample
from sparsekv.ops.draw.reference import cut
from sparsekv.ops.noise import mix, uniform


def _batch(count: int, **fields: object) -> SamplingBatch:
    """`count` samples of one request with seed 7, at temperature 1."""
    settings: dict = {
        "seed": torch.full((count,), 7),
        "index": torch.arange(count),
        "temperature": torch.ones(count),
        "filters": None,
        "penalised": None,
        "penalties": None,
        "rows": torch.zeros(count, dtype=torch.int64),
        "logprobs": None,
        "limited": False,
    }
    return SamplingBatch(**(settings | fields))


def test_splitmix_is_the_published_one() -> None:
    """The first outputs of SplitMix64 seeded with 1234567, from its authors' code."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % 2**64 for i in range(3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [x % 2**64 for x in mix(signed).tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_uniform_and_distinct() -> None:
    seed, index, position = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (10, 20, 100)), indexing="ij"))
    u = uniform(seed, index, position)
    assert len(u.unique()) == len(u)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u, 20, 0, 1)
    assert ((histogram - 1000).abs() < 150).all()
    correlation = torch.corrcoef(u.view(200, 100))
    assert (correlation - torch.eye(200)).abs().max() < 0.5


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5])
    count = 40_000
    sampled = sample(
        logits.expand(count, -1),
        _batch(count, temperature=torch.full((count,), 0.7)),
        positions=torch.full((count,), 3),
        history=TokenHistory(1, torch.device("cpu")),
    )
    share = torch.bincount(sampled.tokens, minlength=6) / count
    assert torch.allclose(share, (logits / 0.7).softmax(-1), atol=0.01)
    assert share[4] == 0


@pytest.mark.parametrize("name", ["min_p", "top_k", "top_p"])
def test_filters_are_those_of_transformers(name: str) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 2
    off = {"min_p": torch.zeros(50), "top_k": torch.zeros(50, dtype=torch.int64), "top_p": torch.ones(50)}
    warper = {"min_p": MinPLogitsWarper(0.2), "top_k": TopKLogitsWarper(4), "top_p": TopPLogitsWarper(0.6)}[name]
    value = {"min_p": 0.2, "top_k": 4, "top_p": 0.6}[name]
    ours = cut(logits, **{**off, name: torch.full_like(off[name], value)})
    assert torch.equal(ours.isinf(), warper(torch.zeros(50, 1, dtype=torch.int64), logits).isinf())
    assert torch.equal(cut(logits, **off), logits)


def test_penalties() -> None:
    """Repetition as in Transformers over prompt and output; presence and frequency over the output alone."""
    history = TokenHistory(2, torch.device("cpu"))
    history.load(1, [3, 4], [5, 5], vocab=8)
    history.add(torch.tensor([1]), torch.tensor([6]))
    logits = torch.randn(1, 8)
    ours = history.penalise(logits, torch.tensor([1]), torch.tensor([[1.5], [0.5], [0.25]]))
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 4, 5, 5, 6]]), logits.clone())
    theirs[0, 5] -= 0.5 + 0.25 * 2
    theirs[0, 6] -= 0.5 + 0.25
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sample_does_not_depend_on_its_company(ahead: bool) -> None:
    model, many = attached("dms"), prompts(9, 17, 4, 12)
    params = [
        SamplingParams(n=3, max_tokens=8, seed=5, temperature=0.8, top_p=0.9),
        SamplingParams(max_tokens=12, seed=5, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
        greedy(6, repetition_penalty=1.2),
        SamplingParams(n=2, max_tokens=9, seed=-1, top_k=5, min_p=0.05, min_tokens=4, stop_token_ids=[1, 2, 3, 4]),
    ]
    together = engine(model, max_num_seqs=8, async_scheduling=ahead).generate(many, params)
    cramped = engine(model, max_num_seqs=2, pages=96).generate(many, params)
    for prompt, each, a, b in zip(many, params, together, cramped, strict=True):
        (c,) = engine(model).generate(prompt, each)
        assert [x.token_ids for x in a.outputs] == [x.token_ids for x in b.outputs] == [x.token_ids for x in c.outputs]


def test_seeds_are_distinct_and_reproducible() -> None:
    llm = engine(attached("dms"), max_num_seqs=16)
    (prompt,) = prompts(6)

    def draw(seed: int | None) -> list[tuple[int, ...]]:
        params = SamplingParams(n=16, max_tokens=12, seed=seed, temperature=1.5)
        return [tuple(c.token_ids) for c in llm.generate(prompt, params)[0].outputs]

    assert len(set(draw(0))) == 16
    assert draw(0) == draw(0)
    assert not set(draw(0)) & set(draw(1))
    assert not set(draw(None)) & set(draw(None))


def test_penalties_follow_the_sequence_through_forks() -> None:
    """With a huge repetition penalty no token comes twice, for any sample, also where rows are short."""
    model = attached("dms")
    (prompt,) = prompts(6)
    params = SamplingParams(n=4, max_tokens=20, seed=0, repetition_penalty=1e9, temperature=0.5, presence_penalty=2)
    for rows in (2, 8):
        for c in engine(model, max_num_seqs=rows).generate(prompt, params)[0].outputs:
            assert len(set(c.token_ids)) == 20


def test_min_tokens_and_ignore_eos() -> None:
    model = attached("dense")
    (prompt,) = prompts(6)
    stops = list(range(60))  # nearly every token ends it
    first = engine(model).generate(prompt, greedy(9, stop_token_ids=stops))[0].outputs[0]
    assert len(first.token_ids) == 1
    later = engine(model).generate(prompt, greedy(9, stop_token_ids=stops, min_tokens=3))[0].outputs[0]
    assert later.token_ids[:3] == [60, 60, 60]
    model.generation_config.eos_token_id = stops
    assert len(engine(model).generate(prompt, greedy(9))[0].outputs[0].token_ids) == 1
    assert len(engine(model).generate(prompt, greedy(9, ignore_eos=True))[0].outputs[0].token_ids) == 9


def test_logprobs_are_the_model_s() -> None:
    model = attached("dense")
    (prompt,) = prompts(7)
    params = SamplingParams(max_tokens=5, seed=3, temperature=0.7, top_k=20, logprobs=2)
    (c,) = engine(model).generate(prompt, params)[0].outputs
    with torch.no_grad():
        logits = model(torch.tensor([prompt + c.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert c.logprobs is not None
    for token, row, entries in zip(c.token_ids, expected, c.logprobs, strict=True):
        top = row.topk(2)
        assert next(iter(entries)) == token
        assert set(entries) == {token, *top.indices.tolist()}
        for i, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[i]))
            assert entry.rank == 1 + int((row > row[i]).sum())
    chosen = expected.gather(-1, torch.tensor(c.token_ids)[:, None])
    assert c.cumulative_logprob == pytest.approx(float(chosen.sum()))
    assert engine(model).generate(prompt, greedy(2))[0].outputs[0].logprobs is None
