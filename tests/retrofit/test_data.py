"""Training rows: decided by seed and number alone, each source in proportion, in many templates; streams skip."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from sparsekv.evals import templates
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.items import ItemBuilder
from sparsekv.retrofit.data.config import Source, describe_data, texts_of
from sparsekv.retrofit.data.documents import Documents, held_out, read_all
from sparsekv.retrofit.data.retrieval_rows import training_item
from sparsekv.retrofit.data.rows import Blend, blend

TOKENIZER = tiny.tokenizer()
TEXT = tiny.text(1500, seed=9)
CORPUS = Corpus([TEXT], TOKENIZER)


def documents(kind: str, training: list[str], **changes: Any) -> Documents:
    names = ["memory"] if kind in ("text", "jsonl") else []
    weight = changes.pop("weight", 1.0)
    return Documents(source=Source(kind=kind, names=names, weight=weight), training=training, held_out=[], **changes)


def half_retrieval(*, weight: float = 1.0, seed: int = 0, length: int = 512) -> Blend:
    sources = [documents("text", [TEXT]), documents("retrieval", [], weight=weight)]
    return blend(sources, TOKENIZER, count=40, length=length, seed=seed)


def is_text(row: torch.Tensor) -> bool:
    return TOKENIZER.decode(row) in TEXT


def test_rows_do_not_depend_on_the_order_of_access() -> None:
    forwards, backwards = half_retrieval(), half_retrieval()
    ahead = [forwards[i]["input_ids"] for i in range(12)]
    behind = [backwards[i]["input_ids"] for i in reversed(range(12))]
    assert all(torch.equal(a, b) for a, b in zip(ahead, reversed(behind), strict=True))
    assert not all(torch.equal(a, half_retrieval(seed=1)[i]["input_ids"]) for i, a in enumerate(ahead))
    assert {row.shape for row in ahead} == {(512,)}


@pytest.mark.parametrize(("weight", "of_four"), [(1.0, 2), (3.0, 3), (1 / 3, 1)])
def test_each_batch_holds_each_source_in_proportion(weight: float, of_four: int) -> None:
    rows = half_retrieval(weight=weight)
    for batch in range(3):
        texts = [is_text(rows[batch * 4 + i]["input_ids"]) for i in range(4)]
        assert texts.count(False) == of_four


def test_rows_in_pieces_hold_whole_texts_of_each_length_in_turn() -> None:
    sources = [documents("text", [TEXT]), documents("retrieval", [])]
    rows = blend(sources, TOKENIZER, count=40, length=1024, seed=0, pieces=[1, 2])
    found: Counter[tuple[bool, int]] = Counter()
    for row in map(rows.__getitem__, range(40)):
        ids, pieces = row["input_ids"], row["documents"]
        texts = [ids[pieces == i] for i in range(int(pieces.max()) + 1)]
        assert {len(text) for text in texts} == {1024 // len(texts)}
        assert (pieces.diff() >= 0).all()
        assert len({is_text(text) for text in texts}) == 1
        found[is_text(texts[0]), len(texts)] += 1
    assert found == Counter({(kind, count): 10 for kind in (True, False) for count in (1, 2)})
    alone = blend(sources, TOKENIZER, count=40, length=1024, seed=0)
    assert torch.equal(rows[0]["input_ids"], alone[0]["input_ids"])
    assert "documents" not in alone[0]


def test_items_use_many_templates_and_only_those_of_training() -> None:
    builder = ItemBuilder(CORPUS, TOKENIZER)
    seen: Counter[str] = Counter()
    answers: Counter[int] = Counter()
    unseen = (*templates.UNSEEN, *templates.LOOK_UP)
    openings = {t.statement.split("{")[0]: t for t in (*templates.TRAINING, *unseen) if t.statement[0] != "{"}
    for i in range(200):
        item = training_item(builder, np.random.default_rng(i), 700)
        whole = TOKENIZER.decode(item.ids)
        seen.update(opening for opening in openings if opening in whole)
        answers[len(item.answers)] += 1
        assert len(item.ids) == 700
    known = {opening for opening, template in openings.items() if template in templates.TRAINING}
    assert len(known & set(seen)) > 0.9 * len(known)
    assert not set(seen) & (set(openings) - known)
    assert len(answers) >= 4


def test_too_little_text_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 100000 tokens are asked for"):
        half_retrieval(length=100_000)


def test_short_documents_are_packed_and_numbered() -> None:
    short = [tiny.text(30, seed=i) for i in range(9)]
    rows = blend([documents("text", short)], TOKENIZER, count=8, length=256, seed=0)
    again = blend([documents("text", short)], TOKENIZER, count=8, length=256, seed=0)
    for index in (5, 2):
        ids, numbers = rows[index]["input_ids"], rows[index]["documents"]
        assert torch.equal(ids, again[index]["input_ids"])
        pieces = [TOKENIZER.decode(ids[numbers == n]) for n in range(int(numbers.max()) + 1)]
        assert len(pieces) > 2
        assert all(piece in short for piece in pieces[:-1])
        assert any(text.startswith(pieces[-1]) for text in short)


def test_what_the_model_wrote_is_packed_whatever_its_lengths() -> None:
    mixed = [tiny.text(count, seed=count) for count in (20, 900, 40)]
    written = Documents(source=Source(kind="self"), training=mixed, held_out=[])
    rows = blend([written], TOKENIZER, count=6, length=256, seed=0)
    assert max(int(rows[i]["documents"].max()) for i in range(6)) > 0
    starts = [TOKENIZER.decode(rows[i]["input_ids"][:6]) for i in range(6)]
    assert all(any(text.startswith(start) for text in mixed) for start in starts)


@pytest.mark.parametrize(
    ("kinds", "measured"),
    [(["retrieval", "self", "text"], "text"), (["retrieval", "self"], "self"), (["retrieval"], "retrieval")],
)
def test_a_run_is_measured_on_data_before_the_models_own_text_and_retrieval(kinds: list[str], measured: str) -> None:
    names = {"text": ["memory"], "retrieval": ["memory"]}
    found = [
        Documents(source=Source(kind=kind, names=names.get(kind, [])), training=["x"], held_out=[kind])
        for kind in kinds
    ]
    assert held_out(found) == [measured]


def test_a_stream_goes_on_where_a_stopped_run_was_and_begins_anew_at_its_end() -> None:
    texts = [tiny.text(60, seed=i) for i in range(20)]

    def streamed() -> Blend:
        return blend([documents("text", [], stream=lambda: iter(texts))], TOKENIZER, count=200, length=128, seed=0)

    rows, resumed = streamed(), streamed()
    whole = [rows[i]["input_ids"] for i in range(60)]
    assert all(torch.equal(resumed[i]["input_ids"], whole[i]) for i in range(50, 60))
    packed = torch.cat(whole)
    assert TOKENIZER.decode(packed[:256]).startswith(texts[0][:50])
    passes = [i for i in range(1, 60) if torch.equal(whole[i], whole[0])]
    assert len(passes) >= 2
    assert torch.equal(streamed()[passes[0] + 3]["input_ids"], whole[3])


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def chat(words: int, *, seed: int = 0) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"question {seed}"},
        {"role": "assistant", "content": tiny.text(words, seed=seed)},
    ]
    return {"messages": turns}


def read(source: Source, tokenizer: Any = TOKENIZER) -> list[Documents]:
    return read_all([source], tokenizer, model="", seed=0)


def test_chats_go_through_the_template_and_stay_whole(tmp_path: Path) -> None:
    name = lines(tmp_path / "chats.jsonl", [chat(20, seed=i) for i in range(20)])
    (found,) = read(Source(kind="jsonl", names=[name]))
    assert found.training[0].startswith("<|user|>question 0<|end|><|assistant|>")
    assert len(found.training) == 18
    assert "question 19" in held_out([found])[-1]
    rows = blend([found], TOKENIZER, count=4, length=256, seed=0)
    starts = [i for i in range(256) if rows[0]["documents"][i] != rows[0]["documents"][i - 1]]
    assert all(TOKENIZER.decode(rows[0]["input_ids"][i:]).startswith("<|user|>") for i in starts)


def test_a_chat_longer_than_a_row_is_refused_cut_or_dropped(tmp_path: Path) -> None:
    name = lines(tmp_path / "chats.jsonl", [chat(20, seed=1), chat(900, seed=2), chat(20, seed=3), chat(9, seed=4)])

    def rows(long: str) -> list[str]:
        found = read(Source(kind="jsonl", names=[name], long=long))
        built = blend(found, TOKENIZER, count=30, length=512, seed=0)
        return [TOKENIZER.decode(built[i]["input_ids"]) for i in range(30)]

    with pytest.raises(ValueError, match=r"chat 1 of .*chats\.jsonl has \d+ tokens and rows have 512; use longer rows"):
        rows("refuse")
    assert any("question 2" in row for row in rows("cut"))
    assert not any("question 2" in row for row in rows("drop"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2 of .* holds no 'messages'"),
        ({"messages": "x"}, "line 2 of .* is no chat"),
        ({"messages": [{"role": "user"}]}, "line 2 of .* is no chat"),
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Source(kind="jsonl", names=[lines(tmp_path / "c.jsonl", [chat(9), row])]))


def test_chats_without_a_template_or_a_file_are_one_sentence(tmp_path: Path) -> None:
    name = lines(tmp_path / "c.jsonl", [chat(9)])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        read(Source(kind="jsonl", names=[name]), tiny.tokenizer(chat=False))
    with pytest.raises(ValueError, match=r"cannot read .*none\.jsonl as JSON lines"):
        read(Source(kind="jsonl", names=[str(tmp_path / "none.jsonl")]))


def test_a_blend_in_words() -> None:
    data = [Source(kind="text", names=["a", "b"], weight=3), Source(kind="retrieval")]
    assert describe_data(data) == "75% a + b, 25% long-range retrieval"
    assert texts_of(data) == ["a", "b"]


def test_a_dataset_streams_after_its_held_out_documents(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}. " + tiny.text(30, seed=i), "good": i % 2 == 0} for i in range(400)]
    lines(tmp_path / "train.jsonl", rows)
    source = Source(kind="huggingface", dataset=str(tmp_path), where="good")
    (found,) = read(source)
    assert [text.split(".")[0] for text in found.held_out] == [f"document {2 * i}" for i in range(64)]
    assert found.training[0].startswith("document 128. ")
    built = blend([found], TOKENIZER, count=3, length=256, seed=0)
    assert TOKENIZER.decode(built[0]["input_ids"]).startswith("document 128. ")
    with pytest.raises(ValueError, match="has no column 'txt'; it has text, good"):
        read(Source(kind="huggingface", dataset=str(tmp_path), column="txt"))
    with pytest.raises(ValueError, match="cannot load the dataset"):
        read(Source(kind="huggingface", dataset=str(tmp_path / "none")))


def test_verified_answers_of_a_dataset_become_chats(tmp_path: Path) -> None:
    rows = [
        {"problem": f"what is {i}", "generations": [f"<think>no{i}", f"<think>yes{i}"], "right": [False, True]}
        for i in range(100)
    ]
    lines(tmp_path / "train.jsonl", rows)
    settings = {"column": "generations", "prompt": "problem", "where": "right", "long": "drop", "streaming": False}
    (found,) = read(Source(kind="huggingface", dataset=str(tmp_path), **settings))
    assert found.training[0] == "<|user|>what is 64<|end|><|assistant|><think>yes64<|end|>"
    assert found.chats
    assert len(found.held_out) == 64
    assert not any("no1" in text for text in found.held_out)


def test_the_models_own_text_is_decided_by_the_seed_and_kept(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Source(kind="self", documents=4, tokens=24, prompts=["The old ship", "Light"])

    def texts(seed: int) -> list[str]:
        (found,) = read_all([source], TOKENIZER, model=str(folder), seed=seed)
        return found.training + found.held_out

    first = texts(0)
    assert len(first) == 4
    assert [text.startswith(start) for text, start in zip(first, source.prompts * 2, strict=True)] == [True] * 4
    (kept,) = (tmp_path / "sparsekv" / "own").iterdir()
    kept.unlink()
    assert texts(0) == first
    assert texts(1) != first
    monkeypatch.setattr("sparsekv.retrofit.data.own_text.load_model", None)
    assert texts(0) == first
    drawn = Source(kind="self", documents=2, tokens=24)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_all([drawn], TOKENIZER, model=str(folder), seed=0)[0].training[0]
