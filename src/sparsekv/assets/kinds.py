"""Readers of further kinds of text, each from one Debian package or wheel: how it becomes documents.

reference   the manual of GNU Octave by chapter: octave-doc (GPL-3+)
essays      An Anarchist FAQ by section, long argued prose: anarchism (GPL-2+)
code        Python source files of Django, the longer ones: the wheel Django (BSD-3)
dialogue    questions and answers by topic, as chats: the wheel chatterbot-corpus (BSD-3)
lexicon     the Jargon File's entries by letter: jargon-text (public domain)
"""

import gzip
import json
import re
import zipfile
from pathlib import Path

import yaml

from sparsekv.assets.debs import members
from sparsekv.assets.markup import html_text

_SKIP = frozenset({"head", "header", "style", "script", "nav", "copiable-anchor"})
CODE_FROM = 6000
"""Characters of the shortest source file that is read."""
EXCHANGES = 12
"""Of one chat: enough for several hundred tokens."""


def manual_chapters(deb: Path) -> list[str]:
    """The manual's chapters, their sections in the order of the table of contents."""
    folder = "./usr/share/doc/octave/octave.html/"
    pages = _pages(deb, folder)
    chapters: dict[str, list[str]] = {}
    for page, number in re.findall(r'<li><a id="toc-[^"]*" href="([^"#]+)">(\d+)[ .]', pages["index.html"]):
        text = re.sub(r"\n?(?:Next|Previous|Up): [^\n]*", "", html_text(pages.pop(page, ""), skip=_SKIP))
        chapters.setdefault(number, []).append(text)
    return ["\n\n".join(filter(None, parts)).strip() for parts in chapters.values()]


def essay_sections(deb: Path) -> list[str]:
    """The sections of the FAQ, without its appendices."""
    folder = "./usr/share/doc/anarchism/html/"
    pages = _pages(deb, folder + "sec")
    return [html_text(pages[name], skip=_SKIP) for name in sorted(pages, key=_natural)]


def source_files(wheel: Path) -> list[str]:
    """Source files, each under its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") and "/locale/" not in name]
        sources = {name: archive.read(name).decode() for name in sorted(names)}
    return [f"# {name}\n\n{text}" for name, text in sources.items() if len(text) >= CODE_FROM]


def chats(wheel: Path) -> list[str]:
    """Chats as JSON lists of messages: neighbouring exchanges of one topic, those that are repeated once."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if re.search(r"/data/english/\w+\.yml$", n)):
            turns = [tuple(map(str, turn)) for turn in yaml.safe_load(archive.read(name))["conversations"]]
            exchanges = [turn for turn in dict.fromkeys(turns) if len(turn) == 2]
            for start in range(0, len(exchanges), EXCHANGES):
                texts = [text for turn in exchanges[start : start + EXCHANGES] for text in turn]
                roles = ("user", "assistant") * (len(texts) // 2)
                chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
                found.append(json.dumps(chat, ensure_ascii=False))
    return found


def lexicon_letters(deb: Path) -> list[str]:
    """The entries of each letter."""
    name = "./usr/share/doc/jargon-text/jargon.txt.gz"
    (packed,) = (content for path, content in members(deb, lambda path: path == name))
    parts = re.split(r"(?m)^ {1,2}([A-Z])$", gzip.decompress(packed).decode())  # the index before has three spaces
    entries: dict[str, str] = {}
    for letter, part in zip(parts[1::2], parts[2::2], strict=True):
        body = re.sub(r"(?m)^ {3}", "", re.split(r"(?m)^ *Appendix ", part)[0])
        body = body[body.index("\n:") + 1 :].strip()  # after the list of the entries
        entries[letter] = entries.get(letter, f"{letter}\n") + "\n" + body
    return list(entries.values())


def _pages(deb: Path, start: str) -> dict[str, str]:
    """HTML pages of a package by the name of their file."""
    return {
        name.rpartition("/")[2]: content.decode("utf-8", errors="replace")
        for name, content in members(deb, lambda name: name.startswith(start) and name.endswith(".html"))
    }


def _natural(name: str) -> list[tuple[str, int]]:
    return [(word, int(number or 0)) for word, number in re.findall(r"([A-Za-z.]+)(\d*)", name)]
