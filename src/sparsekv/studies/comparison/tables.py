"""The comparison's tables. Random is in each that compares methods; dense is the first line."""

from collections.abc import Sequence

from sparsekv.json_lines import Line
from sparsekv.markdown import table
from sparsekv.studies.comparison.results import (
    DENSE,
    Results,
    Score,
    by_depth,
    in_order,
    read_a_step,
    right,
    score,
    text_of,
)

RISE, PART = 0.005, 0.5
"""What DMS + Quest is to reach: reads of at most PART of DMS's, at a perplexity of at most 1 + RISE of its."""


def quality(results: Results, ratio: float) -> str:
    """What is held, read and lost at a ratio; questions over all lengths."""
    text = ["held", "peak", "read a step", "perplexity", "divergence"] if results.measures_text else []
    rows = []
    for method in results.methods(ratio):
        lines = results.of(method, ratio)
        line = text_of(lines)
        rows.append([method, *(_text(line) if line else [""] * len(text))])
        rows[-1] += [_percent(right(lines, kind=kind)) for kind in results.kinds]
    return table(["method", *text, *results.kinds], rows)


def lengths(results: Results, ratio: float) -> str:
    """Right answers over all kinds, by the length of the text."""
    rows = []
    for method in results.methods(ratio):
        lines = results.of(method, ratio)
        rows.append([method, *(_percent(right(lines, length=length)) for length in results.lengths)])
    return table(["method", *(f"{length} tokens" for length in results.lengths)], rows)


def depths(results: Results, ratio: float) -> str:
    """Right answers over all kinds and lengths, by where the fact is told."""
    found = {method: by_depth(results.of(method, ratio)) for method in results.methods(ratio)}
    quarters = list(found[DENSE])
    rows = [[method, *(_percent(shares[quarter]) for quarter in quarters)] for method, shares in found.items()]
    return table(["method", *quarters], rows)


def shares(results: Results, method: str = "dms") -> str:
    """What DMS + Quest reads beside what DMS does, bounds counted, and what that costs."""
    rows = []
    for ratio in results.ratios:
        whole = text_of(results.of(method, ratio))
        for line in results.shares(ratio) if whole else []:
            assert whole is not None
            reads, rise = read_a_step(line) / read_a_step(whole), _over(line, whole)
            reached = "yes" if reads <= PART and rise <= RISE else "no"
            rows.append(
                [
                    f"{ratio:g}",
                    f"{line['reads']:.1%}",
                    f"{read_a_step(line):.0f}",
                    f"{reads:.0%}",
                    f"{rise:+.2%}",
                    reached,
                ]
            )
    head = ["ratio", "pages asked for", "read a step", "over DMS's reads", "perplexity over DMS", "half at +0.5 %"]
    return table(head, rows) if rows else ""


def speed(lines: Sequence[Line]) -> str:
    """Tokens a second and milliseconds a step, by batch."""
    batches = sorted({line["batch"] for line in lines})
    head = ["method", "held", "read a step", *(f"tokens/s, batch {batch}" for batch in batches)]
    head += [f"ms a step, batch {batch}" for batch in batches]
    rows = []
    for method in sorted({line["method"] for line in lines}, key=in_order):
        mine = {line["batch"]: line for line in lines if line["method"] == method}
        last = mine[batches[-1]]
        held = [f"{last['tokens_held']:.0f}", f"{last['kv_reads'] / (last['output'] - 1):.0f}"]
        speeds = [f"{mine[batch]['tokens_per_second']:,.0f}" for batch in batches]
        rows.append([method, *held, *speeds, *(f"{mine[batch]['step_ms']:.2f}" for batch in batches)])
    return table(head, rows)


def _text(line: Line) -> list[str]:
    held = [f"{line['tokens_held']:.0f}", f"{line['peak_tokens']:.0f}", f"{read_a_step(line):.0f}"]
    if line["cr"] is None:
        return [*held, f"{score(line, 'perplexity').value:.2f}", ""]
    return [*held, score(line, "rise").percent(2, sign=True), f"{score(line, 'divergence').value:.4f}"]


def _over(line: Line, other: Line) -> float:
    return (1 + score(line, "rise").value) / (1 + score(other, "rise").value) - 1


def _percent(found: Score | None) -> str:
    return "" if found is None else found.percent()
