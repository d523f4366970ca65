"""The grammar: what is the evaluation's is nowhere in training's, and an answer stands where it was told."""

import numpy as np
import pytest

import tiny
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.grammar import forms, wordings, words
from sparsekv.evals.grammar.puzzles import SENTENCE, WAYS, Part, forms_of, puzzle, relations
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.retrieval import GRAMMAR, retrieval_cells
from sparsekv.retrofit.data.retrieval_rows import grammar_item

TRAINING, NEW = Part(), Part(relations=True, wordings=True)


def test_relations_words_and_forms_are_parted() -> None:
    seen, unseen = relations(unseen=False), relations(unseen=True)
    assert not set(seen) & set(unseen)
    assert len(seen) > 60 and len(unseen) > 20
    for name in ("given", "start", "food", "end"):
        assert not set(words.words(name, unseen=False)) & set(words.words(name, unseen=True))
    assert not set(forms.TRAINED) & set(forms.UNSEEN)
    assert wordings.count(unseen=False) > 5000


def test_no_wording_of_the_evaluation_is_training_s() -> None:
    def drawn(unseen: bool) -> set[str]:
        rng = np.random.default_rng(0)
        made = [wordings.wording(rng, unseen=unseen) for _ in range(300)]
        return {text for each in made for text in (each.question, each.lead)}

    assert not drawn(True) & drawn(False)


@pytest.mark.parametrize("part", [TRAINING, NEW, Part(wordings=True, forms=True)])
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_told_and_of_rivals_only_once(way: str, part: Part) -> None:
    rng = np.random.default_rng(1)
    for form in (SENTENCE, *forms_of(part)):
        for _ in range(20):
            facts = puzzle(rng, way, form, part=part, rivals=6)
            assert facts[0].answer in facts[0].statement
            assert len(facts) == (2 if way == "two hops" else 6 if way == "rivals" and form == SENTENCE else 1)
            assert not any("{" in text and "}" not in text for text in (facts[0].question, facts[0].lead))
    with pytest.raises(ValueError, match="a puzzle is 'three hops'"):
        puzzle(rng, "three hops", SENTENCE, part=part)


@pytest.mark.parametrize("part", [TRAINING, NEW])
def test_words_that_could_be_completed_without_the_text_are_not_begun(part: Part) -> None:
    rng, listed = np.random.default_rng(1), {word for name in words._PARTS for word in words._PARTS[name].split()}
    facts = [fact for _ in range(200) for way in WAYS for fact in puzzle(rng, way, SENTENCE, part=part)]
    assert {fact.begun for fact in facts} == {True, False}
    assert all(fact.begun == (fact.answer not in listed) for fact in facts)


def test_two_hops_name_what_the_other_fact_names() -> None:
    asked, bridge = puzzle(np.random.default_rng(2), "two hops", SENTENCE, part=TRAINING)
    assert bridge.answer in asked.statement
    assert bridge.answer not in asked.question


def test_items_of_training_and_of_the_evaluation() -> None:
    builder = ItemBuilder(Corpus([tiny.text(9000, seed=0)], tiny.tokenizer()), tiny.tokenizer())
    for seed in range(8):
        item = grammar_item(builder, np.random.default_rng(seed), 3000)
        assert len(item.ids) == 3000
        assert item.answers
    cells = retrieval_cells(builder, kinds=GRAMMAR, contexts=[4000], items=4, seed=0)
    assert [cell.kind for cell in cells] == list(GRAMMAR)
    assert {len(item.ids) for cell in cells for item in cell.items} == {4000}
