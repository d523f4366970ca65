"""Pages of which commands write parts: tables, and the block between a pair of markers."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsekv.json_lines import Line, read_lines

Blocks = Callable[[list[Line]], Sequence[tuple[str, str]]]
"""The lines of a results file -> (name, text) of a block for each page."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table without the last line's end."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def markers(name: str) -> tuple[str, str]:
    """What begins and ends the block of that name."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replaced(page: Path, block: str, *, name: str) -> str:
    """The page's text with another block of that name. Raises ValueError unless it is there and has one pair of its
    markers."""
    begin, end = markers(name)
    if not page.is_file():
        raise ValueError(f"there is no page {page}; give one with the lines {begin} and {end}")
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} needs the lines {begin} and {end}, once each and in this order")
    return f"{text.split(begin)[0]}{begin}\n{block}\n{end}{text.split(end)[1]}"


def rewrite(arguments: Sequence[str], *, usage: str, blocks: Blocks) -> int:
    """The main of a module that writes blocks of pages from a results file: exit code 0, or 2 with one sentence for a
    user's mistake, and no page is changed. usage: the command, whose last words are RESULTS and the pages."""
    if len(arguments) != len(usage.split()) - 3:  # python -m MODULE
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    results, *pages = map(Path, arguments)
    try:
        made = zip(pages, blocks(read_lines(results)), strict=True)
        texts = {page: replaced(page, text, name=name) for page, (name, text) in made}
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    return 0
