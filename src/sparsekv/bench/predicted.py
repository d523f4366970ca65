"""The table of docs/plan.md: measured decode steps beside what the cost model predicts for them.
python -m sparsekv.bench.predicted benchmarks/results/h100.jsonl docs/plan.md

Only the block between the markers is rewritten.
"""

import json
import sys
from pathlib import Path

from sparsekv.bench.targets import Row, size
from sparsekv.cost import against_measured
from sparsekv.markdown import replaced, table

BLOCK = "plan"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    if len(arguments) != 2:
        print("usage: python -m sparsekv.bench.predicted RESULTS.jsonl PAGE.md", file=sys.stderr)
        return 2
    results, page = (Path(argument) for argument in arguments)
    try:
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        text = replaced(page, beside_prediction(rows), name=BLOCK)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    page.write_text(text, encoding="utf-8")
    return 0


def beside_prediction(rows: list[Row]) -> str:
    """One line a measured step. Raises ValueError where the file has none of a known shape and device."""
    steps = against_measured(rows)
    if not steps:
        raise ValueError("the results hold no step of a known shape on a known GPU; measure them with bench.suite")
    commits = ", ".join(dict.fromkeys(step.commit or "unknown" for step in steps))
    lines = [
        (
            step.shape,
            step.gpu,
            size(step.batch, step.context),
            f"{step.ratio:g}",
            f"{step.predicted_ms:.2f}",
            f"{step.measured_ms:.2f}",
            f"{step.over:.2f}",
        )
        for step in steps
    ]
    head = ("shape", "device", "batch x context", "ratio", "predicted ms", "measured ms", "measured / predicted")
    return f"{len(steps)} steps, commit {commits}.\n\n{table(head, lines)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
