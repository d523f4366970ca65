"""Text that can be had without a hub: 106 articles of an encyclopedia, for training, calibration and evaluation.

The articles are the start of the English Wikipedia as of 2016 (CC BY-SA 3.0), which the `gensim` wheel carries as test
data. `plain_text` is a regex cleaner and no parser: templates and tables are dropped whole, with the few words that
some templates set into a sentence, and formulas stay in LaTeX. Articles keep the order of the dump, so that `split`
holds out the same ones everywhere: text that measures a model must never have trained it.
"""

import bz2
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from sparsekv.modeling.wheels import cache_folder, fetch_wheel_member

_REQUIREMENT = "gensim==4.4.0"
_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"

_CLEANED = "encyclopedia-1.json"  # count up when `plain_text` changes what it returns

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_TAG = re.compile(
    r"<(ref|gallery|timeline|imagemap|score)\b[^<>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_WORDS_TEMPLATE = re.compile(
    r"\{\{\s*(?:(?:convert|cvt)\|([^{}|]+)\|([^{}|]+)[^{}]*|(?:lang\|[^{}|]+|nowrap|transl\|[^{}|]+)\|([^{}|]+))\}\}"
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\[\]]*)\]")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NAMESPACE = re.compile(r"\s*:?\s*(?:file|image|category|media|[a-z]{2,3}|wikt)\s*:", re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"^(={2,6})\s*(.+?)\s*\1\s*$", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_LINK_LISTS = re.compile(
    r"^==\s*(?:references|external links|further reading|notes|footnotes|sources|see also|bibliography|citations|"
    r"notes and references)\s*==\s*$.*?(?=^==[^=]|\Z)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


def fetch_text(name: str) -> list[str]:
    """Articles of a named text, in a fixed order, each a title line, a blank line and plain text.

    The only name is `encyclopedia`: 106 articles, about 2.9 MB. Downloaded once, kept as JSON in the cache folder.

    Raises:
        ValueError: an unknown name, or no network (the sentence says which file to place where).
    """
    if name != "encyclopedia":
        raise ValueError(f"Unknown text {name!r}: the only one is 'encyclopedia'")
    folder = cache_folder() / "texts"
    cached = folder / _CLEANED
    if not cached.exists():
        dump = fetch_wheel_member(_REQUIREMENT, _MEMBER, sha256=_SHA256, into=folder)
        partial = cached.with_suffix(".partial")
        partial.write_text(json.dumps(_articles(dump), ensure_ascii=False), encoding="utf-8")
        partial.replace(cached)
    return json.loads(cached.read_text(encoding="utf-8"))


def split(articles: list[str], *, holdout: float = 0.1) -> tuple[list[str], list[str]]:
    """(training, held out): the last `holdout` share of the articles, at least one, is held out.

    Raises:
        ValueError: `holdout` outside (0, 1), or fewer than two articles.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must be between 0 and 1, not {holdout}")
    if len(articles) < 2:
        raise ValueError(f"A split needs two articles or more, not {len(articles)}")
    held = min(max(1, round(holdout * len(articles))), len(articles) - 1)
    return articles[:-held], articles[-held:]


def plain_text(markup: str) -> str:
    """Wiki markup to plain text: links become their text, headings become lines."""
    text = _DROPPED_TAG.sub("", _COMMENT.sub("", markup))
    text = _LINK_LISTS.sub("", text)
    text = _WORDS_TEMPLATE.sub(lambda match: match[3] or f"{match[1]} {match[2]}", text)
    text = _EXTERNAL_LINK.sub(r"\1", _until_stable(_TEMPLATE, "", text))
    text = _until_stable(_LINK, _link_text, _until_stable(_TABLE, "", text))
    text = _QUOTES.sub("", _TAG.sub("", text))
    text = _LIST_ITEM.sub("", _HEADING.sub(r"\2", _MAGIC_WORD.sub("", text)))
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text)  # what a dropped template leaves: "Albedo () is"
    text = re.sub(r"(?<=\() +|[ \t]+(?=[ \t,])", "", text)  # "( al-Jaza'ir", "the vowel , and"
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _until_stable(pattern: re.Pattern[str], replacement, text: str) -> str:
    """Substitutes from the innermost nesting outwards."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _link_text(match: re.Match[str]) -> str:
    return "" if _NAMESPACE.match(match[1]) else match[1].rsplit("|", 1)[-1]


def _articles(dump: Path) -> list[str]:
    """The dump's articles, redirects left out."""
    articles = []
    with bz2.open(dump, "rb") as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.find("{*}redirect") is None and element.findtext("{*}ns") == "0":
                title, markup = element.findtext("{*}title"), element.findtext("{*}revision/{*}text")
                articles.append(f"{title}\n\n{plain_text(markup or '')}")
            element.clear()
    return articles
