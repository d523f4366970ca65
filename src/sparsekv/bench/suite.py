"""Every figure of docs/performance.md, or some: python -m sparsekv.bench.suite OUT.jsonl [COMMIT [PART ...]].

Parts: kernels, steps, transformers, serve, or rows of serve by name. One JSON line a figure, added to the file as it is
measured, so that a run that is cut short keeps what it has.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekv.bench.kernels import bench_decode, bench_prefill
from sparsekv.bench.rivals import KINDS, bench_transformers_step
from sparsekv.bench.serve import WORKS, bench_serve, works_of
from sparsekv.bench.shapes import shape_of
from sparsekv.bench.step import StepBench, random_model

WINDOW = 64
KERNELS = [(32, 32768), (8, 262144), (8, 32768), (1, 32768)]
"""Batch and context of the decode kernel at ratio 8: an eighth of the context is live."""
STEPS = [(8, 32768), (32, 8192), (64, 4096), (8, 8192), (1, 8192)]
SMALL_STEPS = [(8, 8192), (1, 8192)]
PREFILLS = [(8192, 1.0), (8192, 8.0), (32768, 1.0), (32768, 8.0)]
RATIO = 8.0

Keep = Callable[[dict[str, Any]], None]


def main(arguments: list[str]) -> int:
    """Exit code 2 without a GPU: these shapes mean nothing on a CPU. Raises ValueError for an unknown part."""
    if not arguments or not torch.cuda.is_available():
        print(
            "usage, on a machine with a GPU: python -m sparsekv.bench.suite OUT.jsonl [COMMIT [PART ...]]",
            file=sys.stderr,
        )
        return 2
    path, begun = Path(arguments[0]), time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:

        def keep(result: dict[str, Any]) -> None:
            if len(arguments) > 1:
                result["commit"] = arguments[1]
            file.write(json.dumps(result) + "\n")
            file.flush()
            brief = {k: v for k, v in result.items() if k not in ("kernels", "hardware", "torch", "threads", "commit")}
            print(f"[{time.time() - begun:.0f} s] {json.dumps(brief)}", flush=True)

        run(torch.device("cuda"), torch.bfloat16, keep, parts=arguments[2:])
    return 0


def run(device: torch.device, dtype: torch.dtype, keep: Keep, *, parts: Sequence[str] = ()) -> None:
    """Measure everything, or these parts, and hand each result to `keep`. Raises ValueError for an unknown part."""
    rows = [part for part in parts if part not in PARTS]
    works = WORKS if not parts or rows == ["serve"] else works_of(rows)
    for part, measure in PARTS.items():
        if not parts or part in parts:
            measure(device, dtype, keep)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for result in bench_serve(works, device=device, dtype=dtype):
        keep(result)


def _kernels(device: torch.device, dtype: torch.dtype, keep: Keep) -> None:
    large = shape_of("qwen3-8b")
    for batch, context in KERNELS:
        keep(bench_decode(large, batch=batch, context=context, ratio=RATIO, device=device, dtype=dtype))
    for tokens, ratio in PREFILLS:
        keep(bench_prefill(large, tokens=tokens, ratio=ratio, window=WINDOW, device=device, dtype=dtype))


def _steps(device: torch.device, dtype: torch.dtype, keep: Keep) -> None:
    bench = StepBench(shape_of("qwen3-8b"), window=WINDOW, context=32768, device=device, dtype=dtype)
    for batch, context in STEPS:
        for ratio in (RATIO, 1.0):
            kernels = 20 if (batch, ratio) == (8, RATIO) else 0
            keep(bench.run(batch=batch, context=context, ratio=ratio, kernels=kernels))
    bench = StepBench(shape_of("llama-3.2-1b"), window=WINDOW, context=32768, device=device, dtype=dtype)
    for batch, context in SMALL_STEPS:
        keep(bench.run(batch=batch, context=context, ratio=RATIO, kernels=20 if batch == 8 else 0))


def _transformers(device: torch.device, dtype: torch.dtype, keep: Keep) -> None:
    large = shape_of("qwen3-8b")
    model = random_model(large, context=40960, device=device, dtype=dtype)
    for kind in KINDS:
        gc.collect()
        torch.cuda.empty_cache()
        keep(bench_transformers_step(model, large, batch=8, context=32768, kind=kind))


PARTS = {"kernels": _kernels, "steps": _steps, "transformers": _transformers}
"""All but serve, which comes last."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
