"""The markup cleaner by small examples, the split by its properties, and the encyclopedia as a whole."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.modeling.texts import fetch_text, plain_text, split


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("an '''important''' ''word''", "an important word"),
        ("[[Paris]] and [[Lyon|the other]] and [[Nice]]s", "Paris and the other and Nices"),
        ("see [http://a.org/x the site] now", "see the site now"),
        ("before [[File:a.jpg|thumb|a [[nested]] caption]]after", "before after"),
        ("text[[Category:Things]][[de:Ding]]", "text"),
        ("fact<ref name=a>Book, p. 2</ref> and<ref name=a /> more<!-- hidden -->", "fact and more"),
        ("a {{cite|b={{inner}}}}b", "a b"),
        ("about {{convert|12|km|mi}} long, {{lang|fr|bonjour}}", "about 12 km long, bonjour"),
        ("top\n{| class=x\n| cell\n{|\n| nested\n|}\n|}\nbottom", "top\n\nbottom"),
        ("== History ==\ntext\n=== Early ===\nmore", "History\ntext\nEarly\nmore"),
        ("* one\n** two\n# three", "one\ntwo\nthree"),
        ("Albedo ({{IPA}}) is ({{lang}} a) word {{x}}, so", "Albedo is (a) word, so"),
        ("x &amp; y&nbsp;z, H<sub>2</sub>O", "x & y z, H2O"),
        ("end\n==References==\n* a book\n==After==\nkept", "end\nAfter\nkept"),
    ],
)
def test_markup_becomes_text(markup, text):
    assert plain_text(markup) == text


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
    with pytest.raises(ValueError, match="'encyclopedia'"):
        fetch_text("novels")


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
