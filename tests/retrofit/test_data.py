"""Training rows: decided by seed and number alone, half of them retrieval, in many templates."""

from collections import Counter

import numpy as np
import pytest
import torch

import tiny
from sparsekv.evals import templates
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.items import ItemBuilder
from sparsekv.retrofit.data import Blend
from sparsekv.retrofit.retrieval import training_item

TOKENIZER = tiny.tokenizer()
CORPUS = Corpus([tiny.text(1500, seed=9)], TOKENIZER)


def blend(*, share: float = 0.5, seed: int = 0) -> Blend:
    return Blend(CORPUS, TOKENIZER, count=40, batch=4, length=512, retrieval_share=share, seed=seed)


def is_text(row: torch.Tensor) -> bool:
    return TOKENIZER.decode(row) in tiny.text(1500, seed=9)


def test_rows_do_not_depend_on_the_order_of_access() -> None:
    forwards, backwards = blend(), blend()
    ahead = [forwards[i]["input_ids"] for i in range(12)]
    behind = [backwards[i]["input_ids"] for i in reversed(range(12))]
    assert all(torch.equal(a, b) for a, b in zip(ahead, reversed(behind), strict=True))
    assert not torch.equal(ahead[0], blend(seed=1)[0]["input_ids"])
    assert {row.shape for row in ahead} == {(512,)}


@pytest.mark.parametrize(("share", "retrieval"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_the_share_of_retrieval_in_each_batch(share: float, retrieval: int) -> None:
    rows = blend(share=share)
    for batch in range(3):
        texts = [is_text(rows[batch * 4 + i]["input_ids"]) for i in range(4)]
        assert texts.count(False) == retrieval


def test_items_use_many_templates_and_only_those_of_training() -> None:
    builder = ItemBuilder(CORPUS, TOKENIZER)
    seen: Counter[str] = Counter()
    answers: Counter[int] = Counter()
    openings = {t.statement.split("{")[0]: t for t in (*templates.TRAINING, *templates.UNSEEN) if t.statement[0] != "{"}
    for i in range(120):
        item = training_item(builder, np.random.default_rng(i), 700)
        whole = TOKENIZER.decode(item.ids)
        seen.update(opening for opening in openings if opening in whole)
        answers[len(item.answers)] += 1
        assert len(item.ids) == 700
    known = {opening for opening, template in openings.items() if template in templates.TRAINING}
    assert len(known & set(seen)) > 0.9 * len(known)
    assert not set(seen) & (set(openings) - known)
    assert len(answers) >= 4


def test_rows_longer_than_every_document_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 100000 tokens are asked for"):
        Blend(CORPUS, TOKENIZER, count=4, batch=4, length=100_000, retrieval_share=0.5, seed=0)
