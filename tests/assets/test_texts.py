"""The split by its properties, and each text as a whole."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.assets.texts import fetch_text, split, text_file, text_names


@given(st.lists(st.text(max_size=3), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_a_split_keeps_every_article_once_and_in_order(articles, holdout):
    train, held = split(articles, holdout=holdout)
    assert train + held == articles
    assert train
    assert held
    assert abs(len(held) - holdout * len(articles)) <= 1
    assert split(articles, holdout=holdout) == (train, held)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.5, 3.0])
def test_a_holdout_that_is_no_share_is_refused(holdout):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(["a", "b"], holdout=holdout)


def test_one_article_cannot_be_split():
    with pytest.raises(ValueError, match="two articles"):
        split(["a"])


def test_an_unknown_text_is_refused():
    with pytest.raises(ValueError, match="the texts are 'encyclopedia', 'handbook', 'reference'"):
        fetch_text("novels")


@pytest.mark.parametrize("name", text_names())
def test_a_file_carried_to_a_machine_without_network_is_enough(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text_file(name).parent.mkdir(parents=True)
    text_file(name).write_text('["one", "two"]')
    assert fetch_text(name) == ["one", "two"]


@pytest.mark.slow
def test_the_encyclopedia_is_plain_text():
    articles = fetch_text("encyclopedia")
    whole = "\n".join(articles)
    assert len(articles) == 106
    assert len(set(articles)) == 106
    assert articles[0].startswith("Anarchism\n\n")
    assert 2.7e6 < len(whole) < 2.9e6
    residue = re.findall(r"\{\{|\[\[|\]\]|\{\||''|<ref|&[a-z]+;|^==", whole, re.MULTILINE)
    assert len(residue) < 50  # of 2.8 million characters; mostly LaTeX braces
    train, held = split(articles)
    assert (len(train), len(held)) == (95, 11)


@pytest.mark.slow
def test_the_handbook_is_chapters_without_navigation():
    chapters = fetch_text("handbook")
    whole = "\n".join(chapters)
    assert len(chapters) == 20
    assert sum(chapter.startswith("Chapter ") for chapter in chapters) == 16
    assert 1.1e6 < len(whole) < 1.2e6
    assert "apt-get install" in whole
    for residue in ("<div", "docnav", "Download the ebook", "\nPrev\n", "\nNext\n"):
        assert residue not in whole


@pytest.mark.slow
def test_the_bible_is_prose_without_numbers():
    books = fetch_text("bible")
    assert len(books) == 66
    assert books[0].startswith("The First Book of Moses, called Genesis\n\nIn the beginning God created")
    assert 4.0e6 < sum(map(len, books)) < 4.2e6
    assert not re.search(r"\d", books[0])
