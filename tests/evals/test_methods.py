"""Methods measured alike: steps are what a prefill gives where both apply, budgets are made for each length, intervals
are those of the textbook, and RULER's items ask for what they tell."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import sparsekv
import tiny
from helpers import dms_model, tiny_model, tokens
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.methods.intervals import bootstrap, share, wilson
from sparsekv.evals.methods.setting import Setting
from sparsekv.evals.methods.steps import walk
from sparsekv.evals.retrieval import retrieval_cells
from sparsekv.evals.ruler import multi_needle, variable_tracking
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.split import SplitModel


def test_steps_give_what_a_prefill_gives_and_count_reads() -> None:
    model = dms_model(window=4)
    with contexts.dense(model):
        split = SplitModel(model)
    ids = tokens(2, 40)
    whole, stepped = (walk(split, ids, start=15, by_steps=by_steps) for by_steps in (False, True))
    assert (whole.hidden - stepped.hidden).abs().max() < 1e-9
    assert whole.stats.held == stepped.stats.held
    assert (whole.tokens == ids[:, 16:]).all()
    assert whole.stats.kv_reads == 0 < stepped.stats.kv_reads


@pytest.mark.parametrize("policy", ["dense", "tova", "h2o", "random", "snapkv", "quest", "streaming"])
def test_prompts_padded_on_the_left_walk_as_they_do_alone(policy: str) -> None:
    """In a pool that just holds the text, too."""
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy=policy, **({} if policy == "dense" else {"budget": 40}))
    with contexts.dense(model):
        split = SplitModel(model)
    ids, pads = tokens(3, 80), torch.tensor([0, 7, 16])
    together = walk(split, ids, start=60, pads=pads)
    for row, pad in enumerate(pads.tolist()):
        alone = walk(split, ids[row : row + 1, pad:], start=60 - pad)
        assert (together.hidden[row] - alone.hidden[0]).abs().max() < 1e-9


def test_a_greedy_walk_is_what_generate_says() -> None:
    model = tiny_model()
    ids = tokens(2, 30)
    plain = model.generate(ids[:, :20], max_new_tokens=10, do_sample=False)
    sparsekv.attach(model, policy="dense")
    assert (walk(SplitModel(model), ids, start=19, greedy=True).tokens == plain[:, 20:]).all()


def test_a_setting_governs_by_the_length_and_gives_the_model_back() -> None:
    model = tiny_model()
    setting = Setting(policy="tova", cr=4)
    setting.attach(model)
    before = attachment_of(model).policy
    with setting.governing(model, tokens=101) as policy:
        assert policy.budget == 26
        assert all(attached.policy is policy for attached in attachment_of(model).layers)
    assert all(attached.policy is before for attached in attachment_of(model).layers)
    with pytest.raises(ValueError, match="context is 256"), setting.governing(model, tokens=2000):
        pass


def test_a_budget_for_the_prompt_alone_leaves_room_and_a_share_follows_the_length() -> None:
    model = tiny_model()
    setting = Setting(policy="snapkv", cr=2)
    setting.attach(model)
    with setting.governing(model, tokens=100) as policy:
        assert policy.budget == 50
    with setting.governing(model, tokens=100, output=12) as policy:
        assert policy.budget == 38
    with pytest.raises(ValueError, match="it is a share above 0"):
        Setting(policy="quest", cr=2, reads=0.5)


def test_wilson_is_the_textbook_s() -> None:
    estimate = wilson(8, 10)  # Newcombe 1998 and any table
    assert (estimate.value, estimate.interval) == (0.8, "wilson")
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (wilson(0, 4).low, wilson(4, 4).high) == (0, 1)


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    estimates = [bootstrap(rng.normal(3, 1, 60), np.ones(60), unit="draws") for _ in range(200)]
    assert 0.88 <= np.mean([e.low <= 3 <= e.high for e in estimates]) <= 0.99
    weighted = bootstrap(np.array([2.0, 6.0]), np.array([1.0, 3.0]), unit="draws", statistic=np.exp)
    assert weighted.value == weighted.low == weighted.high == pytest.approx(np.exp(2))
    assert share([]) is None
    assert share([0.5, 1.0]).interval == "bootstrap over items"


def test_a_chain_of_variables_holds_one_value() -> None:
    asked, *rest = variable_tracking(np.random.default_rng(0))
    names = [asked.answer, *asked.more]
    value = asked.statement.split(" = ")[1].rstrip(".")
    assert len(set(names)) == 5 and value in asked.question and value in asked.lead
    assert [fact.statement for fact in rest] == [f"VAR {name} = VAR {source}." for source, name in pairwise(names)]


def test_one_question_asks_for_all_needles() -> None:
    asked, *rest = multi_needle(np.random.default_rng(0))
    for fact, answer in zip([asked, *rest], [asked.answer, *asked.more], strict=True):
        key = fact.statement.removeprefix("One of the special magic numbers for ").split(" is")[0]
        assert answer in fact.statement and key in asked.question and key in asked.lead


def test_items_hold_every_answer_of_a_list_where_they_say() -> None:
    tokenizer = tiny.tokenizer()
    builder = ItemBuilder(Corpus([tiny.text(1500, seed=9)], tokenizer), tokenizer)
    for cell in retrieval_cells(builder, kinds=["multi-needle", "variable tracking"], contexts=[600], items=3, seed=0):
        for item in cell.items:
            told = tokenizer.decode(item.ids[: item.answers[0][0]])
            answers = [tokenizer.decode(item.ids[a:b]).strip() for a, b in item.answers]
            assert len(item.ids) == 600 and len(set(answers)) == len(answers) >= 4
            assert all(answer in told for answer in answers)
