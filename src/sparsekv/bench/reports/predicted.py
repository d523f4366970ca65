"""The table of docs/plan.md: measured decode steps beside what the cost model predicts for them.
python -m sparsekv.bench.reports.predicted benchmarks/results/h100.jsonl docs/plan.md

Only the block between the markers is rewritten.
"""

import sys

from sparsekv.bench.reports.targets import Row, size
from sparsekv.cost import against_measured
from sparsekv.markdown import rewrite, table

BLOCK = "plan"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.predicted RESULTS.jsonl PAGE.md",
        blocks=lambda rows: [(BLOCK, beside_prediction(rows))],
    )


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
