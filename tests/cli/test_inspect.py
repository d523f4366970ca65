"""inspect: every token and head is there, the counts are the trace's, the page is whole, escaped and self-contained."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekv
from commands import TEXT
from helpers import dms_model, tokens
from sparsekv.cli.inspect.command import cut, inspect_text, to_record
from sparsekv.cli.inspect.kinds import by_age, by_kind, kinds_of, sorted_heads
from sparsekv.cli.inspect.page import Inspected, build_page
from sparsekv.modeling.tracing.trace import inspect

WORDS = TEXT + "Naïve façade: 日本 🙂.\n\nLast."


@pytest.fixture(scope="module")
def inspected(model_folder, adapter_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sparsekv.attach(model, adapter=str(adapter_folder), cr=3)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return inspect_text(model, tokenizer, WORDS, title="a <b> & c", model_name="tiny", method="ours", cr=3)


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.spans: list[tuple[int, str]] = []
        self.buttons: list[tuple[int, str]] = []
        self.addresses: list[str] = []
        self.bits = ""
        self._open: list[str] = []
        self._in_text = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "div":
            self._in_text = found.get("class") == "text"
        if tag == "span" and self._in_text:
            self.spans.append((int(found["data-n"]), ""))
        if tag == "button" and "data-head" in found:
            self.buttons.append((int(found["data-head"]), found["aria-label"]))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] == "span" and self._in_text:
            count, text = self.spans.pop()
            self.spans.append((count, text + data))
        if self._open and self._open[-1] == "script" and not self.bits:
            self.bits = data


def test_the_pieces_of_a_text_join_to_the_text(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids, pieces = cut(tokenizer, WORDS)
    assert ids == tokenizer(WORDS)["input_ids"]
    assert len(pieces) == len(ids)
    assert "".join(pieces) == WORDS
    with pytest.raises(ValueError, match="empty"):
        cut(tokenizer, "")


def test_the_page_holds_every_token_with_its_count(inspected):
    page = Page(build_page(inspected))
    assert "".join(text for _, text in page.spans).replace("\u200b", "") == WORDS
    assert [count for count, _ in page.spans] == inspected.trace.held.sum((0, 1)).tolist()


def test_the_map_holds_every_head_and_its_bits(inspected):
    page, trace = Page(build_page(inspected)), inspected.trace
    layers, kv_heads, length = trace.held.shape
    assert sorted(head for head, _ in page.buttons) == list(range(layers * kv_heads))
    bits = json.loads(page.bits)
    for head, label in page.buttons:
        held = trace.held[head // kv_heads, head % kv_heads]
        assert label.startswith(
            f"layer {head // kv_heads}, head {head % kv_heads}: ratio {length / int(held.sum()):.2f}"
        )
        decoded = np.frombuffer(base64.b64decode(bits[head]), np.uint8)
        assert np.unpackbits(decoded, count=length, bitorder="little").tolist() == held.int().tolist()


def test_the_page_is_self_contained_and_escaped(inspected):
    text = build_page(inspected)
    page = Page(text)
    assert page.addresses == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "<b>" not in text
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"\$[a-z{]", text)


def test_json_agrees_with_the_trace(inspected):
    record = to_record(inspected)
    assert [token["held_by"] for token in record["tokens"]] == inspected.trace.held.sum((0, 1)).tolist()
    assert record["heads"] == 4
    assert sum(token["held_by"] for token in record["tokens"]) == sum(map(sum, record["kv"]["held"]))
    assert json.loads(json.dumps(record)) == record


def test_the_command_writes_both(run, model_folder, adapter_folder, tmp_path):
    text, page = tmp_path / "words.txt", tmp_path / "page.html"
    text.write_text(WORDS, encoding="utf-8")
    common = ["inspect", model_folder, "--adapter", adapter_folder, "--cr", 3, "--file", text]
    outcome = run(*common, "--html", page, "--json")
    assert outcome.code == 0
    assert "".join(token["text"] for token in json.loads(outcome.out)["tokens"]) == WORDS
    assert "words.txt" in page.read_text(encoding="utf-8")
    assert run(*common).code == 2


def test_only_governed_layers_are_on_the_map():
    model = dms_model("Gemma3")
    ids = tokens(1, 40)
    trace = inspect(model, ids)
    page = build_page(Inspected(title="t", model="m", method="a", cr=None, pieces=["x"] * 40, trace=trace))
    assert {label.split(",")[0] for _, label in Page(page).buttons} == {"layer 1"}


def test_a_file_that_is_no_text(run, model_folder, adapter_folder, tmp_path):
    binary = tmp_path / "x.bin"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    outcome = run("inspect", model_folder, "--adapter", adapter_folder, "--file", binary, "--json")
    assert outcome.code == 2
    assert "not a UTF-8 text" in outcome.err


def test_kinds_ages_and_sorted_heads_by_hand():
    pieces = ["a", "b", "c", "d", " Anna", " met", " 3", "men", ",", "\n", "Then", " x"]
    assert kinds_of(pieces)[4:] == [
        *(
            "capitalised word",
            "word",
            "number",
            "inside a word",
            "punctuation",
            "line break",
            "capitalised word",
            "word",
        )
    ]
    held = torch.zeros(2, 2, len(pieces), dtype=torch.bool)
    held[:, :, :4] = True
    held[0, 0] = True
    shares = {share.name: share for share in by_kind(held, pieces, window=1)}
    assert (shares["first tokens"].held, shares["first tokens"].tokens) == (1, 4)
    assert shares["number"].by_layer == [0.5, 0]
    assert shares["word"].tokens == 1  # the last one is in the window
    assert sorted_heads(held).tolist() == [[1, 4 / 12], [4 / 12, 4 / 12]]
    long = torch.ones(1, 1, 100, dtype=torch.bool)
    assert [(share.name, share.tokens) for share in by_age(long)] == [
        *(("0 to 15", 16), ("16 to 31", 16), ("32 to 63", 32), ("64 to 99", 36))
    ]


def test_methods_side_by_side(run, model_folder, adapter_folder, tmp_path):
    text, page, picture = tmp_path / "words.txt", tmp_path / "page.html", tmp_path / "figures.png"
    text.write_text(WORDS, encoding="utf-8")
    outcome = run(
        *("inspect", model_folder, "--file", text, "--adapter", adapter_folder, "--policy", "tova"),
        *("--cr", 3, "--html", page, "--png", picture, "--json"),
    )
    assert outcome.code == 0, outcome.err
    ours, tova = json.loads(outcome.out)
    assert (ours["method"], tova["method"]) == (str(adapter_folder), "tova")
    assert tova["kv"]["tokens_held"] == -(-len(tova["tokens"]) // 3)
    assert len(Page(page.read_text(encoding="utf-8")).spans) == 2 * len(tova["tokens"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for wrong, message in {
        (): "there is nothing to see yet: pass --adapter",
        ("--policy", "dms"): "needs trained eviction heads",
        ("--policy", "dms", "--policy", "dmc"): "both say what to do with adapters",
        ("--adapter", adapter_folder, "--budget", 9): "does not take budget",
    }.items():
        outcome = run("inspect", model_folder, "--file", text, "--json", *wrong)
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err
