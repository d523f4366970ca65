"""vLLM with the plugin beside vLLM alone, as a table: python -m sparsekv.bench.reports.vllm RESULTS.jsonl PAGE.md

The results hold lines of benchmarks/vllm_plugin.py. Only the block between the markers `vllm` is rewritten.
"""

import sys
from dataclasses import dataclass

from sparsekv.json_lines import Line
from sparsekv.markdown import rewrite, table

BLOCK = "vllm"
MODES = {"dense": "dense", "fp8": "dense, FP8 KV", "plugin": "plugin"}
HEAD = ("GPUs", "work", *MODES.values(), "ratio of a probe", "plugin beside dense", "aimed at", "")
GAINS = {
    "8 x 32,768": 2.0, "32 x 8,192": 2.0, "1 x 8,192": 1.0, "serve": 3.5, "churn 64": 1 / 1.05, "longest": 6.0,
}  # fmt: skip
"""How many times as fast, or as long, as dense vLLM the plugin was to be at ratio 8 on one GPU."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What was done, and what counts of it."""

    parallel: tuple[int, int]
    """Tensor, pipeline."""
    what: str
    key: str
    """Of GAINS, where something was aimed at; many requests have one, however many they are."""
    value: str
    """The field that counts."""
    fewer: bool
    """Whether less of it is better."""


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.vllm RESULTS.jsonl PAGE.md",
        blocks=lambda rows: [(BLOCK, make(rows))],
    )


def make(rows: list[Line]) -> str:
    """Where it was measured, and the table."""
    if not rows:
        raise ValueError("the results hold no lines; run benchmarks/vllm_plugin.py")

    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows))

    about = (
        f"{listed('shape')} with random weights, {listed('device')}, vLLM {listed('vllm')}, commit {listed('commit')}, "
        "seed 0, on both sides vLLM's own scheduler and as much memory for keys and values. The heads are dialled so "
        "that a whole sequence is held at a ratio of 8; a probe of it has at most 4,096 tokens, and the same window."
    )
    return f"{about}\n\n{table(HEAD, lines(rows))}"


def lines(rows: list[Line]) -> list[list[str]]:
    """A row of HEAD for each work."""
    found: dict[Work, dict[str, Line]] = {}
    for row in rows:
        work = _work(row)
        if work is not None:
            found.setdefault(work, {})[row["mode"]] = row
    return [_line(work, own, found) for work, own in found.items()]


def _work(row: Line) -> Work | None:
    parallel = row["tp"], row["pp"]
    if row["what"] == "step":
        at = f"{row['batch']} x {row['context']:,}"
        return Work(parallel=parallel, what=f"step of {at} tokens, ms", key=at, value="ms", fewer=True)
    if row["what"] == "serve":
        what = f"{row['requests']} x ({row['in']:,} in, {row['out']:,} out), tokens/s"
        return Work(parallel=parallel, what=what, key="serve", value="out_tokens_per_second", fewer=False)
    if row["what"] == "churn":
        at_once = row.get("at_once", "all")
        what = f"{row['requests']} x (256 in, 64 to 448 out), {at_once} at once, s"
        return Work(parallel=parallel, what=what, key=f"churn {at_once}", value="seconds", fewer=True)
    if row["what"] == "longest":
        what = f"longest sequence in {row['kv_gib']:g} GiB, tokens"
        return Work(parallel=parallel, what=what, key="longest", value="tokens", fewer=False)
    return None


def _line(work: Work, own: dict[str, Line], found: dict[Work, dict[str, Line]]) -> list[str]:
    tensor, pipeline = work.parallel
    cells = [f"{own[mode][work.value]:,g}" if mode in own else "-" for mode in MODES]
    ratio = own["plugin"].get("ratio_of_probe") if "plugin" in own else None
    gain = _gain(work, own, found)
    aimed = work.parallel == (1, 1) and not (work.key == "serve" and "dense" in own)  # at as many as the plugin holds
    aim = GAINS.get(work.key) if aimed else None
    return [
        "1" if tensor == pipeline == 1 else f"{tensor * pipeline}, {'tensor' if tensor > 1 else 'pipeline'} parallel",
        work.what,
        *cells,
        "-" if ratio is None else f"{ratio:.1f}",
        "-" if gain is None else f"{gain:.2f} x",
        "-" if aim is None else f"{aim:.2f} x",
        "" if aim is None or gain is None else "met" if gain >= aim else "missed",
    ]


def _gain(work: Work, own: dict[str, Line], found: dict[Work, dict[str, Line]]) -> float | None:
    """Over dense at the same work; where dense was not given so many requests, over those that fill its memory."""
    alike = [each for other, each in found.items() if (other.key, other.parallel) == (work.key, work.parallel)]
    rivals = [each["dense"] for each in (own, *alike) if "dense" in each]
    if "plugin" not in own or not rivals:
        return None
    ratio = own["plugin"][work.value] / rivals[0][work.value]
    return 1 / ratio if work.fewer else ratio


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
