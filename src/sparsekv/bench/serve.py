"""Generated tokens per second when a fixed memory for keys and values is full: the largest batch that fits, dense and
compressed.

All sequences read `prompt` tokens and write `output` tokens together. The step is measured at POINTS moments of the
output, evenly spaced, and the throughput is batch / mean step: prefill is not counted, nor are arrivals.
"""

from typing import Any

from sparsekv.attend.allocate import PAGE_SIZE
from sparsekv.bench.step import StepBench

POINTS = 4
ROOM = 1.05
"""Memory over live tokens: half-filled pages and rings."""


def largest_batch(bench: StepBench, *, memory: int, tokens: int, ratio: float) -> int:
    """Sequences of `tokens` tokens, held at `ratio`, that fit in `memory` bytes."""
    live = tokens / ratio * bench.shape.kv_bytes(bench.dtype.itemsize)
    pages = PAGE_SIZE / 2 * bench.shape.kv_bytes(bench.dtype.itemsize)
    return int(memory / max(live * ROOM, live + pages)) if ratio > 1 else int(memory / (live + pages))


def bench_serve(
    bench: StepBench, *, memory: int, prompt: int, output: int, ratio: float, seed: int = 0
) -> dict[str, Any]:
    """Tokens per second at the largest batch. Raises ValueError where not even one sequence fits."""
    batch = largest_batch(bench, memory=memory, tokens=prompt + output, ratio=ratio)
    if batch < 1:
        raise ValueError(f"{memory} bytes hold no sequence of {prompt + output} tokens at ratio {ratio:g}; give more")
    contexts = [prompt + round(output * (i + 0.5) / POINTS) for i in range(POINTS)]
    runs = [bench.run(batch=batch, context=context, ratio=ratio, seed=seed) for context in contexts]
    mean = sum(run["ms"] for run in runs) / POINTS
    kept = ("shape", "ratio", "window", "copy_bytes_per_s", "commit", "hardware", "threads", "torch")
    return {
        "bench": "serve",
        "batch": batch,
        "memory": memory,
        "prompt": prompt,
        "output": output,
        "contexts": contexts,
        "step_ms": [run["ms"] for run in runs],
        "tokens_per_s": 1e3 * batch / mean,
        "seed": seed,
        **{key: runs[0][key] for key in kept},
    }
