"""Plain text out of wiki markup and out of HTML: regex and tag cleaners for the texts of texts.py, no full parsers."""

import html
import re
from html.parser import HTMLParser

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


def wiki_text(markup: str) -> str:
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


_BLOCKS = frozenset({"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "tr", "pre", "br", "dt", "dd"})
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col"})


def html_text(page: str, *, skip: frozenset[str]) -> str:
    """An HTML page to plain text: a line for each block, `pre` with its own lines, elements whose tag, id or class is
    in `skip` left out."""
    reader = _Reader(skip)
    reader.feed(page)
    reader.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(reader.parts).replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Reader(HTMLParser):
    def __init__(self, skip: frozenset[str]) -> None:
        super().__init__()
        self.skip = skip
        self.parts: list[str] = []
        self.open: list[str] = []
        self.skipping = 0
        """Depth of `open` at which a skipped element began, 0 outside of one."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)
        if tag in _VOID:
            return
        self.open.append(tag)
        names = {tag, *(name for key, value in attrs if key in ("id", "class") for name in (value or "").split())}
        if not self.skipping and names & self.skip:
            self.skipping = len(self.open)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass
        if len(self.open) < self.skipping:
            self.skipping = 0
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.skipping:
            return
        if "pre" not in self.open:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip()
        self.parts.append(data)

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS and not self.skipping and self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")
