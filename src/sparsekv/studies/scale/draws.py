"""What was drawn, in one file of JSON lines a cell: first what it was drawn with, then a line a problem.

A problem's line holds an entry a chain: tokens, ended, answer, right, seen and held (at its end); and by the study's
lengths reads, bounds and peak (tokens of a KV head, averaged over layers and heads) and seconds.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.json_lines import Line, append, parsed, whole
from sparsekv.studies.locks import claimed
from sparsekv.studies.scale.cells import Cell

FOLDER = "draws"


@dataclass(frozen=True, kw_only=True)
class Draws:
    """A cell's file in the study's folder."""

    path: Path

    @staticmethod
    def of(out: Path, cell: Cell) -> "Draws":
        return Draws(path=out / FOLDER / f"{cell.name.replace('/', '~')}.jsonl")

    def read(self) -> tuple[Line | None, list[Line]]:
        """(what it was drawn with, None where nothing was; the problems). A last line without an end is left out: a
        kill has cut it, or another process is writing it.

        Raises ValueError where the file is none of ours.
        """
        if not self.path.exists():
            return None, []
        lines = parsed(self._whole(), name=self.path)
        if lines and "cell" not in lines[0]:
            raise ValueError(f"{self.path} holds no draws of a study; give another --out")
        return (lines[0], lines[1:]) if lines else (None, [])

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether no other process draws the cell, which then this one does within."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.path) as mine:
            yield mine

    def add(self, lines: Sequence[Line]) -> None:
        """Append, in place of what a kill has cut."""
        if self.path.exists():
            os.truncate(self.path, len(self._whole().encode()))
        append(self.path, lines)

    def _whole(self) -> str:
        return whole(self.path.read_text(encoding="utf-8"))


def check(header: Line, wanted: Line, *, out: Path) -> None:
    """Whether draws serve a study: they may be wider and have more lengths, and differ in nothing else.

    Raises ValueError for what differs.
    """
    if header["width"] < wanted["width"]:
        raise ValueError(
            f"{out} holds draws of {header['width']} chains and the study asks for W = {wanted['width']}: lower its "
            "widths, or give another --out"
        )
    missing = sorted(set(wanted["lengths"]) - set(header["lengths"]))
    if missing:
        raise ValueError(
            f"{out} holds draws cut at L = {', '.join(map(str, header['lengths']))} and the study asks for "
            f"{', '.join(map(str, missing))} too: leave that out, or give another --out"
        )
    for name in set(wanted) - {"width", "lengths"}:
        if header.get(name) != wanted[name]:
            raise ValueError(
                f"{out} holds {header['cell']} drawn with {name} {_shown(header.get(name))} and the study says "
                f"{_shown(wanted[name])}: change it back, or give another --out"
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
