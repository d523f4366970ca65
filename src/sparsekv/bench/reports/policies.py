"""docs/policies.md from a results file of bench.policies: python -m sparsekv.bench.reports.policies RESULTS PAGE."""

import sys
from typing import Any

from sparsekv.bench.reports.targets import size
from sparsekv.markdown import rewrite, table

BLOCK = "policies"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.policies RESULTS.jsonl PAGE.md",
        blocks=lambda rows: [(BLOCK, block(rows))],
    )


def block(rows: list[dict[str, Any]]) -> str:
    """The steps, then the prompts."""
    steps = [row for row in rows if row["bench"] == "step"]
    prompts = [row for row in rows if row["bench"] == "prompt"]
    first = steps[0]
    origin = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, seed {first['seed']}."
    return "\n\n".join([f"{first['shape']} shape, random weights; {origin}", _steps(steps), _prompts(prompts)])


def _steps(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step, beside DMS's and beside dense attention over as many tokens as are held or read."""
    points = list(dict.fromkeys((row["batch"], row["context"]) for row in rows if row["policy"] == "dms"))
    head = ["method"]
    for point in points:
        head += [f"{size(*point)}, ms", "over DMS", "over dense of as many"]
    names = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "dense"))
    found = {(row["policy"], row["batch"], row["context"]): row["ms"] for row in rows}
    ratio = next(row["ratio"] for row in rows if row["policy"] == "dms")
    lines = []
    for name in names:
        cells = [name]
        for batch, context in points:
            ms = found[name, batch, context]
            as_many = found["dense", batch, int(context / ratio)]
            cells += [f"{ms:.2f}", f"{ms / found['dms', batch, context]:.2f}x", f"{ms / as_many:.2f}x"]
        lines.append(cells)
    dense = ["dense, all tokens"]
    for batch, context in points:
        ms = found["dense", batch, context]
        dense += [f"{ms:.2f}", f"{ms / found['dms', batch, context]:.2f}x", ""]
    return f"A decode step at ratio {ratio:g}:\n\n" + table(head, [*lines, dense])


def _prompts(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        seconds = (f"{row['dense_s']:.2f}", f"{row['read_s']:.2f}", f"{row['prune_s']:.3f}")
        lines.append([row["policy"], *seconds, f"{row['prune_of_read']:.1%}"])
    tokens, ratio = rows[0]["tokens"], rows[0]["ratio"]
    head = ["method", "read densely, s", "read and watched, s", "pruned, s", "pruning over reading"]
    return f"A prompt of {tokens // 1024}K, pruned to {tokens / ratio / 1024:g}K:\n\n" + table(head, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
