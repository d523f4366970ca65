"""Pages of which commands write parts: tables, and the block between a pair of markers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


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
