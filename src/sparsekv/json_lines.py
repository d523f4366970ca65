"""Files of JSON lines, the form of all results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""What one line holds."""


def read_lines(results: Path) -> list[Line]:
    """What a results file holds. Raises ValueError where it is none."""
    try:
        text = results.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {results}: {error.strerror}") from None
    return parsed(text, name=results)


def parsed(text: str, *, name: Path) -> list[Line]:
    """JSON lines. Raises ValueError, with the file's name, for a text that is none."""
    try:
        return [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError:
        raise ValueError(f"{name} is no file of JSON lines") from None


def whole(text: str) -> str:
    """Without a last line that has no end: a kill has cut it, or another process is writing it."""
    return text[: text.rfind("\n") + 1]


def append(results: Path, lines: Sequence[Line]) -> None:
    """Write lines at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
