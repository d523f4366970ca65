"""Evaluation: dense costs nothing, cache and mask agree, the ratio is the allocator's, more forgetting costs more."""

import json
import math
from dataclasses import replace

import pytest
import torch

import sparsekv
import tiny
from helpers import tiny_model, tokens
from sparsekv.evals import retrieval
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.evaluate import Point, describe, evaluate
from sparsekv.evals.forward import read
from sparsekv.evals.items import Item, ItemBuilder
from sparsekv.evals.settings import EvaluationConfig
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.split import SplitModel

SETTINGS = EvaluationConfig(rows=3, length=64, items=2, contexts=[256], batch=2)


@pytest.fixture
def model():
    built = tiny_model(vocab_size=512, max_position_embeddings=2048)
    sparsekv.attach(built, policy="dms", window=5)
    tiny.random_heads(sparsekv.heads(built))
    return built


def scores(model, points, *, settings=SETTINGS, others=None, **changes):
    documents = [tiny.text(900, seed=3)]
    settings = replace(settings, **({"eviction": "mask"} | changes))
    return evaluate(model, tiny.tokenizer(), documents=documents, points=points, settings=settings, others=others)


@pytest.mark.parametrize("eviction", ["mask", "cache"])
def test_offset_minus_infinity_is_dense(model, eviction: str) -> None:
    (score,) = scores(model, [Point(asked=1, offset=-math.inf)], eviction=eviction)
    assert score.ratio == 1
    assert abs(score.divergence) < 1e-6
    assert score.agreement == 1
    assert score.perplexity == pytest.approx(score.perplexity_dense, rel=1e-5)
    assert json.loads(json.dumps(score.to_dict()))["offset"] is None


def test_forgetting_costs_and_both_ways_agree(model) -> None:
    points = [Point(offset=o) for o in (-4.0, 0.0, 1e9)]
    masked, cached = scores(model, points), scores(model, points, eviction="cache")
    for a, b in zip(masked, cached, strict=True):
        assert a.ratio == pytest.approx(b.ratio, rel=1e-9)
        assert a.divergence == pytest.approx(b.divergence, rel=1e-3, abs=1e-6)
        assert a.retrieval == b.retrieval
    assert masked[0].ratio < masked[1].ratio < masked[2].ratio == pytest.approx(64 / 5)
    assert 0 < masked[0].divergence < masked[2].divergence
    assert masked[1].agreement < 1
    assert attachment_of(model).policy.offset == 0
    assert "divergence" in describe(masked[0])


def test_held_is_what_the_allocator_holds_with_lag_and_sliding_layers() -> None:
    model = tiny_model("Gemma3")
    sparsekv.attach(model, policy="dms", window=4, lag=1, offset=0.5)
    tiny.random_heads(sparsekv.heads(model))
    ids = tokens(2, 40)
    with_cache, without = (read(SplitModel(model), ids, eviction=eviction) for eviction in ("cache", "mask"))
    assert with_cache.held == pytest.approx(without.held, rel=1e-9)
    assert torch.allclose(with_cache.hidden, without.hidden, atol=1e-4)


def test_other_policies_are_measured_too() -> None:
    model = tiny_model(vocab_size=512, max_position_embeddings=2048)
    sparsekv.attach(model, policy="streaming", budget=16)
    (score,) = scores(model, [Point()])
    assert score.ratio == pytest.approx(64 / 16)
    with pytest.raises(ValueError, match="policy 'streaming' has no offset"):
        scores(model, [Point(offset=0.0)])


def test_other_texts_and_longer_rows_are_measured_side_by_side(model) -> None:
    other = {"other": [tiny.text(900, seed=4)]}
    (score,) = scores(model, [Point(asked=2.0, offset=0.0)], others=other, long_lengths=[192])
    assert set(score.others) == {"other", "192 tokens"}
    assert score.others["192 tokens"].ratio > score.ratio  # the window weighs less
    assert score.others["other"].perplexity_dense != score.perplexity_dense
    assert score.others["other"].offset == score.offset == 0
    assert "other" in describe(score)
    (alone,) = scores(model, [Point(asked=2.0, offset=0.0)])
    assert (alone.perplexity, alone.retrieval) == (score.perplexity, score.retrieval)


def test_each_text_can_be_dialled_to_the_ratio_asked_for(model) -> None:
    other = {"other": [tiny.text(900, seed=4)]}
    (score,) = scores(model, [Point(asked=3.0, offset=0.0)], others=other, same_ratio=True)
    assert score.ratio == pytest.approx(3, rel=0.05)
    assert score.others["other"].ratio == pytest.approx(3, rel=0.05)
    assert attachment_of(model).policy.offset == 0


def test_generated_answers_are_the_forced_ones(model) -> None:
    split = SplitModel(model)
    builder = ItemBuilder(Corpus([tiny.text(900, seed=3)], tiny.tokenizer()), tiny.tokenizer())
    for cell in retrieval.retrieval_cells(builder, kinds=["pass key", "look-up"], contexts=[256], items=4, seed=0):
        for item in cell.items[1:3]:
            answer_as_the_model_would(split, item)
        forced = retrieval.forced(split, cell, lambda ids: read(split, ids, eviction="cache"), batch=2)
        assert retrieval.generated(split, cell, batch=3) == forced == [False, True, True, False]


def answer_as_the_model_would(split: SplitModel, item: Item) -> None:
    for at in range(*item.answers[0]):
        ids = torch.from_numpy(item.ids[:at].astype("int64"))[None]
        item.ids[at] = split.logits(read(split, ids, eviction="cache").hidden[0, -1]).argmax()


def test_time_is_bounded(model) -> None:
    settings = EvaluationConfig(rows=1, length=32, items=0, seconds=1e-9)
    assert len(scores(model, [Point(offset=0.0)] * 3, settings=settings)) == 1


def test_chunked_divergence_is_the_whole_one_in_value_and_gradient(model) -> None:
    split = SplitModel(model)
    split.chunk = 7
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 20, 32, generator=generator) for _ in range(2))
    student.requires_grad_()
    expected = sparsekv.dms.kl_teacher_student(split.logits(teacher), split.logits(student)).mean()
    (gradient,) = torch.autograd.grad(3 * expected, student)
    value = split.divergence(teacher, student, sparsekv.dms.kl_teacher_student)
    (ours,) = torch.autograd.grad(3 * value, student)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours, gradient, atol=1e-7)


def test_a_model_that_scales_its_logits_is_refused() -> None:
    model = tiny_model("Granite", logits_scaling=8.0)
    with pytest.raises(ValueError, match="GraniteForCausalLM scales its logits"):
        SplitModel(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": [0.5]}, "ratios has 0.5"),
        ({"rows": 0}, "rows is 0"),
        ({"contexts": [5]}, "contexts has 5 tokens"),
        ({"eviction": "air"}, "eviction is 'air'"),
        ({"answers": "generated", "eviction": "mask"}, "use eviction: cache"),
        ({"long_lengths": [1]}, "long_lengths has 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**values)
