"""The cleaners of wiki markup and HTML, by small examples."""

import pytest

from sparsekv.assets.markup import html_text, wiki_text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("an '''important''' ''word''", "an important word"),
        ("[[Paris]] and [[Lyon|the other]] and [[Nice]]s", "Paris and the other and Nices"),
        ("see [http://a.org/x the attached] now", "see the attached now"),
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
    assert wiki_text(markup) == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one <b>two</b>,\n three</p><p>four</p>", "one two, three\nfour"),
        ("<h1>A &amp; B</h1><p>x&nbsp;y<br/>z</p>", "A & B\nx y\nz"),
        ("<pre>\nls -l\n  total 0\n</pre><p>after</p>", "ls -l\n  total 0\nafter"),
        ('<ul class="nav top"><li>Next</li></ul><div>kept <a/>text</div>', "kept text"),
        ("<head><title>dropped</title></head><div id=nav><p>x</p></div><p>kept</p>", "kept"),
        ("<p>never closed<p>next", "never closed\nnext"),
    ],
)
def test_html_becomes_text(page, text):
    assert html_text(page, skip=frozenset({"head", "nav"})) == text
