"""The tables of docs/performance.md from a results file:
python -m sparsekv.bench.report benchmarks/results/h100.jsonl docs/performance.md

Only the block between the markers is rewritten.
"""

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    if len(arguments) != 2:
        print("usage: python -m sparsekv.bench.report RESULTS.jsonl PAGE.md", file=sys.stderr)
        return 2
    results, page = (Path(argument) for argument in arguments)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"Error: {page} needs {BEGIN} and {END}, once each", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}", encoding="utf-8")
    return 0


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown of everything that `bench.suite` measures."""
    first = rows[0]
    kinds = {kind: [r for r in rows if r["bench"] == kind] for kind in ("decode", "prefill", "step", "serve")}
    parts = [
        f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, seed {first['seed']}; bf16, medians.",
        "Decode kernel, one layer at the Qwen3-8B shape, a ratio of 8:",
        _table(
            ("batch", "mean live tokens a head", "us", "share of copy bandwidth"),
            [
                (r["batch"], f"{r['context'] / r['ratio']:.0f}", f"{r['us']:.1f}", f"{r['of_copy']:.1%}")
                for r in kinds["decode"]
            ],
        ),
        "Prefill attention, one layer at the Qwen3-8B shape, beside causal SDPA (cuDNN):",
        _table(
            ("tokens", "ratio", "ms", "cuDNN ms", "times as fast"),
            [
                (r["tokens"], f"{r['ratio']:g}", f"{r['ms']:.2f}", f"{r['sdpa_ms']:.2f}", f"{r['speedup']:.2f}")
                for r in kinds["prefill"]
            ],
        ),
        "Whole decode step (roofline: all weights and the live keys and values at copy speed):",
        _table(
            ("shape", "batch x context", "ratio", "ms", "roofline ms", "over roofline", "KV bytes used / live"),
            [
                (
                    r["shape"],
                    f"{r['batch']} x {r['context']}",
                    f"{r['ratio']:g}",
                    f"{r['ms']:.2f}",
                    f"{r['roofline_ms']:.2f}",
                    f"{r['over_roofline']:.2f}",
                    f"{r['used_over_live_kv_bytes']:.3f}",
                )
                for r in kinds["step"]
            ],
        ),
        "Generated tokens per second with a fixed memory for keys and values, the largest batch that fits:",
        _table(
            ("ratio", "memory GiB", "batch", "tokens/s"),
            [(f"{r['ratio']:g}", r["memory"] >> 30, r["batch"], f"{r['tokens_per_s']:.0f}") for r in kinds["serve"]],
        ),
        "Plain Transformers with SDPA, the same decode step dense:",
        _table(
            ("cache", "batch x context", "ms"),
            [
                (r["cache"], f"{r['batch']} x {r['context']}", f"{r['ms']:.0f}")
                for r in rows
                if r["bench"] == "transformers step"
            ],
        ),
        *_profile(kinds["step"]),
    ]
    return "\n\n".join(parts)


def _profile(steps: list[dict[str, Any]]) -> list[str]:
    """Where a step's time goes, by kernel, for the first step that was profiled."""
    profiled = next((r for r in steps if r.get("kernels")), None)
    if profiled is None:
        return []
    rows = [(k["kernel"][:60], f"{k['launches']:.0f}", f"{k['ms']:.3f}") for k in profiled["kernels"]]
    what = f"Kernels of the {profiled['batch']} x {profiled['context']} step at ratio {profiled['ratio']:g}:"
    return [what, _table(("kernel", "launches", "ms"), rows)]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
