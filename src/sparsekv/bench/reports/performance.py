"""The tables of docs/performance.md from a results file, of bench.suite or of `make bench-cpu`:
python -m sparsekv.bench.reports.performance benchmarks/results/h100.jsonl docs/performance.md

Only the block of that kind of machine, between its markers, is rewritten.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sparsekv.bench.reports.targets import VLLM, Row, against_targets, size
from sparsekv.bench.timing import median
from sparsekv.markdown import rewrite, table

BLOCK, CPU_BLOCK = "performance", "performance-cpu"
GROUPS = {
    "matrix products of the weights": ("_linear", "nvjet", "void cublasLt::splitKreduce"),
    "decode attention": ("_decode",),
    "marks and placement": ("_place_one",),
    "norms, RoPE and activation, fused": ("triton_",),
}
"""Group -> what its kernels' names begin with."""


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(arguments, usage="python -m sparsekv.bench.reports.performance RESULTS.jsonl PAGE.md", blocks=_block)


def _block(rows: list[Row]) -> list[tuple[str, str]]:
    """Of whole forwards on a CPU, or of bench.suite."""
    return [(CPU_BLOCK, plain(rows)) if any("sparsekv_ms" in row for row in rows) else (BLOCK, full(rows))]


def plain(rows: list[Row]) -> str:
    """Whole forwards beside plain Transformers (bench/plain.py): one line a measurement, medians over its runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bench"], row.get("context") or row["tokens"], row["marks"]), []).append(row)
    first, lines = rows[0], []
    for (bench, tokens, marks), runs in groups.items():
        speedups = [run["speedup"] for run in runs]
        what = f"a token after {tokens}" if bench == "decode" else f"read {tokens} tokens"
        lines.append(
            (
                what,
                marks,
                f"{median([run.get('ratio_held', run['ratio_asked']) for run in runs]):.2f}",
                *(f"{median([run[key] for run in runs]):.1f}" for key in ("dense_ms", "sparsekv_ms")),
                f"{median(speedups):.2f}",
                ", ".join(f"{speedup:.2f}" for speedup in speedups),
            )
        )
    head = ("what", "marks", "ratio", "DynamicCache + SDPA, ms", "SparseCache, ms", "times as fast", "every run")
    return (
        f"{first['model']}, {first['hardware']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {first['commit']}; medians of each run, then over runs with a seed each.\n\n"
        + table(head, lines)
    )


def full(rows: list[Row]) -> str:
    """Everything that `bench.suite` measures."""
    first = rows[0]
    kinds = {kind: [r for r in rows if r["bench"] == kind] for kind in ("decode", "prefill")}
    steps = ("shape", "batch x context", "ratio 8", "roofline", "over it", "over bytes read", "dense here")
    steps += ("dense roofline", "vLLM BF16", "vLLM FP8", "dense held")
    targets = against_targets(rows)
    parts = [
        f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, seed {first['seed']}; bf16, medians.",
        f"## Targets\n\nOf {len(targets)}, {_verdicts(targets)}.",
        table(("what", "aimed at", "measured", ""), targets),
        "## Decode kernel\n\nOne layer at the Qwen3-8B shape, a ratio of 8.",
        table(
            ("batch x live tokens a head", "us", "us at copy speed", "share of copy bandwidth"),
            [
                (
                    size(r["batch"], int(r["context"] / r["ratio"])),
                    f"{r['us']:.1f}",
                    f"{r['us'] * r['of_copy']:.1f}",
                    f"{r['of_copy']:.1%}",
                )
                for r in kinds["decode"]
            ],
        ),
        "## Prefill attention\n\nOne layer at the Qwen3-8B shape, beside causal SDPA (cuDNN) over repeated KV heads.",
        table(
            ("tokens", "ratio", "ms", "cuDNN ms", "times as fast"),
            [
                (r["tokens"], f"{r['ratio']:g}", f"{r['ms']:.2f}", f"{r['sdpa_ms']:.2f}", f"{r['speedup']:.2f}")
                for r in kinds["prefill"]
            ],
        ),
        "## Decode step\n\nMilliseconds. Roofline: all weights and the live keys and values at copy speed. Bytes read: "
        "the same without an untied embedding, of which a step reads a row a token. vLLM 0.26.0: constants, not of "
        "this run. Dense held: share of the context that the dense rows held.",
        table(steps, _step_lines(rows)),
        "## Plain Transformers\n\nThe same decode step, dense, SDPA.",
        table(
            ("cache", "batch x context", "ms"),
            [
                (r["cache"], size(r["batch"], r["context"]), f"{r['ms']:.0f}")
                for r in rows
                if r["bench"] == "transformers step"
            ],
        ),
        *(part for r in rows if r.get("kernels") for part in _profile(r)),
        *(part for r in rows if r["bench"] == "train" for part in _training(r)),
    ]
    return "\n\n".join(parts)


def _verdicts(targets: list[tuple[str, str, str, str]]) -> str:
    counts = Counter(target[-1] for target in targets)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("met", "missed") if counts[verdict])


def _step_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line a size: ratio 8 beside dense in the same engine, the rooflines and vLLM."""
    lines = []
    steps = [r for r in rows if r["bench"] == "step"]
    dense = {(r["shape"], r["batch"], r["context"]): r for r in steps if r["ratio"] == 1}
    for r in (r for r in steps if r["ratio"] == 8):
        key = (r["shape"], r["batch"], r["context"])
        whole = (r["dense_roofline_ms"] - r["roofline_ms"]) / 1e3 * r["copy_bytes_per_s"] + r["live_kv_bytes"]
        other = dense.get(key)
        lines.append(
            (
                r["shape"],
                size(r["batch"], r["context"]),
                f"{r['ms']:.2f}",
                f"{r['roofline_ms']:.2f}",
                f"{r['over_roofline']:.2f}",
                f"{r['ms'] / r['roofline_without_embedding_ms']:.2f}",
                f"{other['ms']:.2f}" if other else "-",
                f"{r['dense_roofline_ms']:.2f}",
                *(f"{ms:.2f}" if ms else "-" for ms in VLLM.get(key, (None, None))),
                f"{other['live_kv_bytes'] / whole:.1%}" if other else "-",
            )
        )
    return lines


def _profile(step: Row) -> Iterable[str]:
    """Where a step's time goes, by group of kernels, beside the time that their bytes need."""
    weights = step["roofline_without_embedding_ms"] / 1e3 * step["copy_bytes_per_s"] - step["live_kv_bytes"]
    needed = {"matrix products of the weights": weights, "decode attention": step["live_kv_bytes"]}
    lines, left = [], step["ms"]
    for group, begins in GROUPS.items():
        kernels = [k for k in step["kernels"] if k["kernel"].startswith(begins)]
        ms = sum(k["ms"] for k in kernels)
        left -= ms
        floor = f"{1e3 * needed[group] / step['copy_bytes_per_s']:.2f}" if group in needed else "-"
        launches = f"{sum(k['launches'] for k in kernels):.0f}"
        lines.append((group, launches, f"{ms:.2f}", floor, f"{ms / step['ms']:.1%}"))
    lines.append(("the rest: step less the sum (gaps, kernels not listed)", "-", f"{left:.2f}", "-", ""))
    where = f"{size(step['batch'], step['context'])} step of the {step['shape']} shape at ratio {step['ratio']:g}"
    yield f"## Kernels of the {where}\n\nKernels overlap: the time of one counts from the end of the one before."
    yield table(("kernels", "launches", "ms", "ms at copy speed", "of the step"), lines)


def _training(row: Row) -> Iterable[str]:
    """Attention with the gate by backend, and the whole step of a retrofit."""
    step, layers = row["step"], row["step"].get("extrapolated_from_layers")
    how = f", continued as a line from {' and '.join(map(str, layers))} layers" if layers else ""
    yield (
        f"## Training at the {row['shape']} shape\n\n{row['batch']} x {row['tokens']} tokens, commit {row['commit']}. "
        f"Attention of one layer with the gate, forward and backward; a product of large matrices runs at "
        f"{row['matmul_tflops']:.0f} TFLOP/s. The whole step of a retrofit, heads alone{how}: {step['ms']:.0f} ms, "
        f"{step['tflops']:.0f} TFLOP/s, {step['of_matmul']:.0%} of that product's speed."
    )
    lines = [
        (
            name,
            f"{r['forward_ms']:.2f}",
            f"{r['ms']:.2f}",
            f"{r['tflops']:.0f}",
            f"{r['of_matmul']:.0%}",
            f"{r['peak_bytes'] / 2**20:.0f}",
        )
        for name, r in row["attention"]["backends"].items()
    ]
    yield table(("backend", "forward ms", "both ms", "TFLOP/s", "of the product", "peak MiB"), lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
