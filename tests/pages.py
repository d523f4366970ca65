"""A page with a block, before and after a command rewrites it; pages of this repository beside committed results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekv.markdown import markers, replaced

ROOT = Path(__file__).parents[1]


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


def assert_published(
    main: Callable[[list[str]], int], results: str, pages: list[str], folder: Path, *, block: str
) -> None:
    """What `main` makes of a file in benchmarks/results is what the repository's pages show, whatever stood there."""
    copies = [folder / str(index) for index in range(len(pages))]
    for page, copy in zip(pages, copies, strict=True):
        copy.write_text(replaced(ROOT / page, "STALE", name=block))
    assert main([str(ROOT / "benchmarks/results" / results), *map(str, copies)]) == 0
    assert [copy.read_text() for copy in copies] == [(ROOT / page).read_text() for page in pages]
