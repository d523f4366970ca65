"""The server under load, as a table: python -m sparsekv.bench.reports.http RESULTS.jsonl PAGE.md

The results hold lines of `sparsekv bench serve --http --json`, of one machine or several. Only the block between the
markers `serve-http` is rewritten.
"""

import sys
from itertools import groupby

from sparsekv.json_lines import Line
from sparsekv.markdown import rewrite, table

BLOCK = "serve-http"

LOADS = {
    "direct": "all at once, the engine alone",
    "peak": "all at once",
    "steady": "0.7 of the peak",
    "twice": "twice the peak",
}
MOST_HTTP = 0.05
"""What HTTP may cost of the tokens per second."""
LEAST_GOODPUT = 0.9
"""Tokens per second at twice the peak's rate, in the peak's."""


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.http RESULTS.jsonl PAGE.md",
        blocks=lambda rows: [(BLOCK, make(rows))],
    )


def make(rows: list[Line]) -> str:
    """A table a machine, and what it was to reach."""
    return "\n\n".join(
        part for _, own in groupby(rows, key=lambda row: row["hardware"]) for part in _machine(list(own))
    )


def verdicts(rows: list[Line]) -> list[tuple[str, str, str, str]]:
    """(what, aimed at, measured, 'met' or 'missed'), of each ratio."""
    found = []
    for row in rows:
        if "http_cost" in row:
            cost = row["http_cost"]
            what = f"ratio {row['ratio']:g}: HTTP, of the tokens per second at {row['rows']} streams"
            found.append((what, f"{MOST_HTTP:.0%} or less", f"{cost:.1%}", _met(cost <= MOST_HTTP)))
        if row["load"] == "twice":
            what = f"ratio {row['ratio']:g}: tokens per second at twice the peak's rate, of the peak"
            enough = row["of_peak"] >= LEAST_GOODPUT
            found.append((what, f"{LEAST_GOODPUT:.0%} or more", f"{row['of_peak']:.0%}", _met(enough)))
    return found


def _machine(rows: list[Line]) -> list[str]:
    first, commits = rows[0], ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    about = (
        f"{first['shape'] or 'smollm2-135m'}, {first['hardware']}, torch {first['torch']}, commit {commits}, "
        f"seed {first['seed']}: prompts of {_range(first['prompt'])} tokens, answers of {_range(first['output'])}, "
        f"{first['rows']} streams at once, {first['memory'] >> 20} MiB for keys and values at every ratio."
    )
    head = ("ratio", "requests", "tokens/s", "first token, ms (p99)", "between tokens, ms (p99)", "refused")
    lines = [
        (f"{row['ratio']:g}", LOADS[row["load"]], f"{row['tokens_per_s']:,.0f}", *_times(row), _refused(row))
        for row in rows
    ]
    return [about, table(head, lines), table(("aim", "aimed at", "measured", ""), verdicts(rows))]


def _times(row: Line) -> tuple[str, str]:
    if "first_ms_p50" not in row:
        return "-", "-"
    first, gap = (f"{row[f'{name}_ms_p50']:.0f} ({row[f'{name}_ms_p99']:.0f})" for name in ("first", "gap"))
    return first, gap


def _refused(row: Line) -> str:
    return f"{row['refused']} of {row['requests_sent']}" if "refused" in row else "-"


def _range(pair: list[int]) -> str:
    return f"{pair[0]} to {pair[1]}"


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
