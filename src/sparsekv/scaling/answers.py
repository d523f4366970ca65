r"""Where a chain's answer stands, for a vote over texts of any task. What precedes </think> is thought and no answer.

name     the answer
boxed    what stands in the last whole \boxed{...}
letter   the last letter A to J given as the answer: \boxed{B}, or "Answer: B"
line     the last line that is not empty
number   the last number, by its value: 1,000.50 is 1000.5
text     all of it

Spaces at the ends and in a row do not count. None raises, whatever the text.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from sparsekv.evals.problems.benchmarks.answers import after_thoughts, boxed, choice

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)")
_DIGITS = 100
"""Longer ones are no answers."""


def _plain(text: str | None) -> str | None:
    return (" ".join(text.split()) or None) if text is not None else None


def _line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    if not found or len(found[-1]) > _DIGITS:
        return None
    value = f"{Decimal(found[-1].replace(',', '')):f}"
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return "0" if value == "-0" else value


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "letter": lambda text: choice(text, "A-J"),
    "line": _line,
    "number": _number,
    "text": lambda text: text,
}


def _extractor(find: Callable[[str], str | None]) -> Callable[[str], str | None]:
    return lambda text: _plain(find(after_thoughts(text)))


EXTRACTORS = {name: _extractor(find) for name, find in _FINDERS.items()}
"""By name: from a chain's text to its answer, or None."""
