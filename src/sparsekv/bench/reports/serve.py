"""Whole workloads beside vLLM's on the same machine:
python -m sparsekv.bench.reports.serve RESULTS.jsonl PAGE.md README.md

The results hold lines of `sparsekv bench serve --json` (or bench.suite) and of bench.peer. Only the blocks between the
markers `serve` are rewritten.
"""

import sys
from typing import Any

from sparsekv.markdown import rewrite, table

BLOCK = "serve"
Row = dict[str, Any]

AIMS = {
    "start": 60 / 106,
    "short-greedy": 2.5 / 2.56,
    "short-temperature": 2.55 / 2.60,
    "short-top-p": 2.6 / 12.4,
    "churn-8": 27 / 30.5,
    "churn-1": 30 / 30.5,
    "long-1": 66 / 65.6,
}
"""Work -> seconds that were aimed at, in parts of vLLM's."""
AIMED_THROUGHPUT = 4.0
"""Tokens per second at ratio 8, in dense vLLM's, in the same memory."""
AIMED_CHAINS = {"chains-1": 80_000, "chains-8": 100_000}
"""Work -> tokens per second, on an H100."""
AIMED_GAP = 2.0
"""99th percentile over median of the time between tokens while prompts arrive."""


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.serve RESULTS.jsonl PAGE.md README.md",
        blocks=lambda rows: [(BLOCK, full(rows)), (BLOCK, brief(rows))],
    )


def ours(rows: list[Row]) -> dict[str, Row]:
    """Work -> its line; of several starts the longest. Raises ValueError where lines are of several machines, which
    would compare what cannot be."""
    if len(found := {row["hardware"] for row in rows}) != 1:
        raise ValueError(f"the results are of {len(found)} machines ({', '.join(sorted(found))}); give those of one")
    starts = [row for row in rows if row["work"] == "start" and row["engine"] == "sparsekv"]
    first = {"start": max(starts, key=_seconds)} if starts else {}
    return first | {row["work"]: row for row in rows if row["engine"] == "sparsekv" and row["work"] != "start"}


def peer(rows: list[Row], row: Row) -> Row | None:
    """vLLM's line for the same requests, which it serves dense, or its start at the same shape."""
    same = ("shape", "requests", "samples", "prompt", "output", "sampling", "arrivals")
    theirs = (other for other in rows if other["engine"] != "sparsekv")
    return next((other for other in theirs if all(other.get(key) == row.get(key) for key in same)), None)


def verdicts(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """(what, aimed at, measured, 'met' or 'missed') for every aim of which both sides were measured."""
    found, out = ours(rows), []
    for work, aim in AIMS.items():
        other = peer(rows, found[work]) if work in found else None
        if other is not None:
            share = _seconds(found[work]) / _seconds(other)
            out.append((f"{work}: seconds over vLLM's", f"{aim:.2f}x or less", f"{share:.2f}x", _met(share <= aim)))
    dense = _dense(rows)
    if "long-8" in found and dense is not None:
        more = found["long-8"]["tokens_per_s"] / dense["tokens_per_s"]
        what = "long-8: tokens per second over dense vLLM's in the same memory"
        out.append((what, f"{AIMED_THROUGHPUT:.1f}x or more", f"{more:.2f}x", _met(more >= AIMED_THROUGHPUT)))
    for work, least in AIMED_CHAINS.items():
        if work in found:
            speed = found[work]["tokens_per_s"]
            out.append((f"{work}: tokens per second", f"{least:,} or more", f"{speed:,.0f}", _met(speed >= least)))
    if "arrivals-8" in found:
        share = found["arrivals-8"]["gap_ms_p99"] / found["arrivals-8"]["gap_ms_median"]
        what = "time between tokens while prompts arrive, p99 over median"
        out.append((what, f"{AIMED_GAP:.1f}x or less", f"{share:.2f}x", _met(share <= AIMED_GAP)))
    return out


def brief(rows: list[Row]) -> str:
    """For the README."""
    found = ours(rows)
    judged = verdicts(rows)
    met = sum(line[-1] == "met" for line in judged)
    return "\n\n".join(
        [
            f"Requests in, tokens out, by the clock on the wall, prompts and sampling included: random weights, "
            f"{_origin(found)}, vLLM on the same machine.",
            _table(rows, found),
            *_more(rows, found),
            f"Of {len(judged)} aims {met} met, {len(judged) - met} missed: [all of them](docs/performance.md).",
        ]
    )


def full(rows: list[Row]) -> str:
    """For the page: the aims too, and what streams see."""
    found = ours(rows)
    parts = [
        f"Random weights, {_origin(found)}. vLLM keeps all tokens and runs on the same machine (`python -m "
        f"sparsekv.bench.peer`): its defaults, CUDA graphs of up to 256 sequences, no prefix caching, no text.",
        _table(rows, found),
        *_more(rows, found),
        table(("aim", "aimed at", "measured", ""), verdicts(rows)),
    ]
    if "arrivals-8" in found:
        row = found["arrivals-8"]
        figures = (row["first_ms_median"], row["first_ms_p99"], row["gap_ms_median"], row["gap_ms_p99"])
        parts.append(
            f"While {row['arrivals']:g} prompts of {row['prompt']} arrive a second, a stream has its first token after "
            "{:.0f} ms (median; p99 {:.0f}) and the next ones every {:.1f} ms (p99 {:.1f}).".format(*figures)
        )
    return "\n\n".join(parts)


def _origin(found: dict[str, Row]) -> str:
    row = next(iter(found.values()))
    commits = ", ".join(sorted({str(each["commit"]) for each in found.values()}))
    return f"{row['hardware']}, torch {row['torch']}, commit {commits}, seed {row['seed']}"


def _table(rows: list[Row], found: dict[str, Row]) -> str:
    lines = []
    for work, row in found.items():
        other = peer(rows, row)
        theirs = f"{_seconds(other):.1f}" if other else "-"
        times = f"{_seconds(other) / _seconds(row):.2f}" if other else "-"
        speed = "-" if work == "start" else f"{row['tokens_per_s']:,.0f}"
        held = "-" if work == "start" else f"{row['ratio_held']:.1f}"
        what = (
            f"start of an engine and its first requests, {row['rows']} sequences" if work == "start" else _requests(row)
        )
        lines.append((row["shape"], what, f"{row['ratio']:g}", held, f"{_seconds(row):.1f}", theirs, times, speed))
    return table(("shape", "work", "ratio", "held", "s", "vLLM, s", "times as fast", "tokens/s"), lines)


def _more(rows: list[Row], found: dict[str, Row]) -> list[str]:
    dense = _dense(rows)
    if "long-8" not in found or dense is None:
        return []
    many = found["long-8"]
    return [
        f"In the same {many['memory'] >> 30} GiB of keys and values ratio 8 gives "
        f"{many['tokens_per_s'] / dense['tokens_per_s']:.1f} times the tokens per second of dense {dense['engine']} "
        f"({many['requests']} requests at once, and {dense['requests']})."
    ]


def _dense(rows: list[Row]) -> Row | None:
    """vLLM's line of as many long requests as dense caches have room for."""
    return next((row for row in rows if row["engine"] != "sparsekv" and row["work"] == "long-1"), None)


def _requests(r: Row) -> str:
    """ "512 x (256, 64 to 447), greedy, 64 at once"."""
    output = r["output"] if isinstance(r["output"], list | tuple) else (r["output"],)
    sizes = f"{r['requests'] * r['samples']} x ({r['prompt']}, {' to '.join(map(str, output))})"
    when = f"{r['arrivals']:g} a second" if "arrivals" in r else f"{r['rows']} at once"
    return f"{sizes}, {r['sampling']}, {when}"


def _seconds(row: Row) -> float:
    """Of a start, with what is recorded at the first requests, where that was measured."""
    return row["start_s"] + row.get("first_requests_s", 0) if row["work"] == "start" else row["seconds"]


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
