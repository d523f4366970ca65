"""How several entities are told in one block: as a table, JSON, code; for the evaluation alone as CSV, YAML, a letter.

rows: by entity, its values by relation.
"""

import json
import re
from collections.abc import Callable, Mapping

Rows = Mapping[str, Mapping[str, str]]


def table(rows: Rows) -> str:
    """Markdown."""
    columns = _columns(rows)
    lines = [["name", *columns], ["---"] * (1 + len(columns)), *([name, *row.values()] for name, row in rows.items())]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def json_block(rows: Rows) -> str:
    """An object by name."""
    return "\n\n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n\n"


def code(rows: Rows) -> str:
    """Python assignments."""
    lines = [
        f"{_identifier(name)}.{_identifier(relation)} = {value!r}"
        for name, row in rows.items()
        for relation, value in row.items()
    ]
    return "\n\n" + "\n".join(lines) + "\n\n"


def csv(rows: Rows) -> str:
    """Values with semicolons between, names first."""
    lines = [["name", *_columns(rows)], *([name, *row.values()] for name, row in rows.items())]
    return "\n\n" + "\n".join("; ".join(line) for line in lines) + "\n\n"


def yaml(rows: Rows) -> str:
    """A mapping of mappings."""
    lines = []
    for name, row in rows.items():
        lines += [f"{name}:", *(f"  {relation}: {value}" for relation, value in row.items())]
    return "\n\n" + "\n".join(lines) + "\n\n"


def letter(rows: Rows) -> str:
    """Sentences in which the entity is named before its values."""
    parts = []
    for name, row in rows.items():
        told = " and ".join(f"as {relation}, {value}" for relation, value in row.items())
        parts.append(f"You also wanted to hear of {name}. They wrote to me about it last week, and gave, {told}.")
    return "\n\n" + " ".join(parts) + "\n\n"


TRAINED: dict[str, Callable[[Rows], str]] = {"table": table, "json": json_block, "code": code}
UNSEEN: dict[str, Callable[[Rows], str]] = {"csv": csv, "yaml": yaml, "letter": letter}


def _columns(rows: Rows) -> list[str]:
    return list(next(iter(rows.values())))


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text.removeprefix("the ")).lower()
