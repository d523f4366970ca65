"""Rows out of documents of any length. A row is (ids, documents), both int [length]: tokens, and for each the number of
its document within the row, 0, 1, 2, ...: neither attention nor marks cross from one to the next.

A text that ends a row goes on in the next as a document of its own. A chat is never cut in two: where it does not fit,
its beginning fills the row and the whole of it begins the next.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

Row = tuple[np.ndarray, np.ndarray]


def pack(documents: Iterable[np.ndarray], length: int, *, whole: bool) -> Iterator[Row]:
    """Rows of exactly `length` tokens from documents int [any] in their order; what does not fill a row is left out.

    whole: chats, each at most `length` tokens; otherwise texts.
    """
    parts: list[np.ndarray] = []
    room = length
    for document in documents:
        rest = document
        while len(rest):
            part, beyond = rest[:room], rest[room:]
            parts.append(part)
            room -= len(part)
            rest = beyond
            if room == 0:
                yield joined(parts)
                rest = document if whole and len(beyond) and len(part) < len(document) else beyond
                parts, room = [], length


def fill(draw: Callable[[], np.ndarray], length: int) -> Row:
    """One row of documents that `draw` gives, the last of them cut."""
    parts: list[np.ndarray] = []
    room = length
    while room:
        parts.append(draw()[:room])
        room -= len(parts[-1])
    return joined(parts)


def joined(parts: list[np.ndarray]) -> Row:
    """Documents one after the other."""
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts), numbers
