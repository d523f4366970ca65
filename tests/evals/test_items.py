"""Retrieval items: exact length, answers where they are said to be, deterministic, evaluation unseen in training."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from sparsekv.evals import templates
from sparsekv.evals.corpus import Corpus, load_documents
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.retrieval import KINDS, retrieval_cells

TOKENIZER = tiny.tokenizer()
CORPUS = Corpus([tiny.text(1500, seed=9), tiny.text(700, seed=10)], TOKENIZER)
BUILDER = ItemBuilder(CORPUS, TOKENIZER)


@pytest.mark.parametrize("style", BUILDER.styles)
def test_item_has_its_length_and_its_answers(style: str) -> None:
    rng = np.random.default_rng(0)
    facts = [fact for template in templates.TRAINING[4:20:5] for fact in template.facts(rng, 2)]
    item = BUILDER.build(rng, facts, asked=[3, 0], length=700, style=style)
    assert len(item.ids) == 700
    assert [TOKENIZER.decode(item.ids[a:b]) for a, b in item.answers] == [" " + facts[i].answer for i in (3, 0)]
    whole = TOKENIZER.decode(item.ids)
    assert all(fact.statement in whole for fact in facts)
    leads = [whole.rindex(facts[i].lead) for i in (3, 0)]
    assert leads == sorted(leads)
    assert max(whole.index(fact.statement) for fact in facts) < leads[0]


@pytest.mark.parametrize("style", BUILDER.styles)
def test_of_an_answer_that_is_begun_the_rest_is_asked_for(style: str) -> None:
    (fact,) = templates.PASS_KEY.facts(np.random.default_rng(0), 1)

    def asked(answer: str, *, begun: bool) -> list[int]:
        item = BUILDER.build(
            np.random.default_rng(0), [replace(fact, answer=answer, begun=begun)], asked=[0], length=400, style=style
        )
        ((first, last),) = item.answers
        return item.ids[first:last].tolist()

    number = asked("48213", begun=False)
    assert len(number) > 1 and asked("48213", begun=True) == number[1:]
    assert len(asked("the", begun=True)) == 1  # of an answer of one token all


def test_depth_is_random() -> None:
    fact = templates.PASS_KEY.facts(np.random.default_rng(0), 1)
    depths = []
    for seed in range(40):
        item = BUILDER.build(np.random.default_rng(seed), fact, asked=[0], length=600, style="lead")
        depths.append(TOKENIZER.decode(item.ids).index(fact[0].statement))
        assert 0 <= item.depth <= 1
        assert item.depth == pytest.approx(depths[-1] / 2600, abs=0.25)
    assert min(depths) < 400
    assert max(depths) > 1500


def test_a_look_up_asks_for_one_of_many_entries() -> None:
    (cell,) = retrieval_cells(BUILDER, kinds=["look-up"], contexts=[600], items=6, seed=0)
    for item, template in zip(cell.items, templates.LOOK_UP * 2, strict=True):
        before = TOKENIZER.decode(item.ids[: item.answers[0][0]])
        assert before.count(template.statement.split("{")[0]) >= 5
    with pytest.raises(ValueError, match="kinds has 'needle'"):
        retrieval_cells(BUILDER, kinds=["needle"], contexts=[600], items=1, seed=0)


def test_too_many_facts_for_the_length_are_refused() -> None:
    facts = templates.TRAINING[4].facts(np.random.default_rng(0), 8)
    with pytest.raises(ValueError, match="8 facts and 8 questions do not fit into 200 tokens"):
        BUILDER.build(np.random.default_rng(0), facts, asked=list(range(8)), length=200, style="lead")


def test_a_chain_is_told_in_order_and_ends_at_the_first_number() -> None:
    facts = templates.chain(np.random.default_rng(1), 3)
    item = BUILDER.build(np.random.default_rng(1), facts, asked=[2], length=500, style="lead", ordered=True)
    whole = TOKENIZER.decode(item.ids)
    places = [whole.index(fact.statement) for fact in facts]
    assert places == sorted(places)
    assert facts[0].answer in facts[0].statement
    assert facts[2].answer == facts[0].answer


def test_every_template_asks_for_what_it_tells() -> None:
    for template in (*templates.TRAINING, *templates.UNSEEN, *templates.LOOK_UP):
        for fact in template.facts(np.random.default_rng(3), 3, unseen=template not in templates.TRAINING):
            assert fact.answer in fact.statement
            assert fact.answer not in fact.question
            assert "{" not in fact.statement + fact.question + fact.lead


def test_facts_of_a_template_do_not_contradict_each_other() -> None:
    for template in templates.TRAINING:
        leads = [fact.lead for fact in template.facts(np.random.default_rng(5), 3)]
        assert len(set(leads)) == len(leads)


def test_evaluation_shares_no_template_and_no_word_with_training() -> None:
    unseen = (*templates.UNSEEN, *templates.LOOK_UP)
    assert not {t.statement for t in templates.TRAINING} & {t.statement for t in unseen}
    assert not {t.family for t in templates.TRAINING} & {t.family for t in unseen}
    rng = np.random.default_rng(0)
    name = next(t for t in templates.TRAINING if t.statement == "{name} lives in {city}.")
    seen, unseen = (
        {word for _ in range(40) for fact in name.facts(rng, 3, unseen=flag) for word in fact.statement.split()}
        for flag in (False, True)
    )
    assert seen & unseen == {"lives", "in"}


def test_cells_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    def ids(seed: int) -> list[list[int]]:
        return [
            i.ids.tolist()
            for c in retrieval_cells(BUILDER, kinds=KINDS[:5], contexts=[600], items=3, seed=seed)
            for i in c.items
        ]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_a_window_stays_in_its_document_and_knows_its_sentences() -> None:
    text = tiny.text(400, seed=1)
    corpus = Corpus(["Short.", text], TOKENIZER)
    window = corpus.window(np.random.default_rng(0), 100)
    decoded = TOKENIZER.decode(window.ids)
    assert decoded in text
    assert all(TOKENIZER.decode(window.ids[cut:]).lstrip()[0].isupper() for cut in window.cuts)


def test_a_corpus_without_a_long_document_is_refused() -> None:
    corpus = Corpus(["Short."], TOKENIZER)
    for ask in (lambda: corpus.window(np.random.default_rng(0), 50), lambda: corpus.rows(2, 50)):
        with pytest.raises(ValueError, match="rows of 50 tokens are asked for and the longest document has"):
            ask()


def test_held_out_text_is_never_training_text(tmp_path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\n" + tiny.text(50, seed=i))
    training, held_out = load_documents([str(tmp_path)])
    assert [d[:10] for d in training] == ["document 0", "document 1", "document 2"]
    assert [d[:10] for d in held_out] == ["document 3"]
    for space in ("\n", " "):
        single = space.join(f"line {i}" for i in range(100))
        (tmp_path / "single").write_text(single)
        training, held_out = load_documents([str(tmp_path / "single")])
        assert training[0] + held_out[0] == single
        assert 0 < len(held_out[0]) < 0.2 * len(single)
    with pytest.raises(ValueError, match=r"no text nowhere\.txt"):
        load_documents(["nowhere.txt"])
