"""A page with a block, before and after a command rewrites it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekv.markdown import markers


def rewritten(main: Callable[[list[str]], int], rows: list[dict[str, Any]], folder: Path, *, block: str) -> str:
    """The block that `main` writes of `rows`; what stands around it must stay."""
    begin, end = markers(block)
    results, page = folder / "found.jsonl", folder / "page.md"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write_text(f"before\n{begin}\nSTALE\n{end}\nafter\n")
    assert main([str(results), str(page)]) == 0
    head, tail = f"before\n{begin}\n", f"\n{end}\nafter\n"
    text = page.read_text()
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]
