"""Every policy beside DMS and dense, in the same model and engine: a decode step at the same tokens, and a prompt read
and pruned. python -m sparsekv.bench.policies OUT.jsonl [COMMIT], on a GPU; one JSON line a figure, as it is measured.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsekv.attend import Part
from sparsekv.bench.shapes import shape_of
from sparsekv.bench.step import StepBench
from sparsekv.ops.layout import Batch
from sparsekv.policies import Policy
from sparsekv.provenance import environment

SHAPE, RATIO, WINDOW = "qwen3-8b", 8.0, 64
STEPS = [(8, 32768), (32, 8192)]
NAMES = ["dms", "streaming", "snapkv", "random", "h2o", "tova", "quest", "dms-quest"]
PRUNING = ["snapkv", "random", "h2o", "tova"]
PROMPT, CHUNK = 32768, 8192


def main(arguments: list[str]) -> int:
    """Exit code 2 without a GPU."""
    if not arguments or not torch.cuda.is_available():
        print("usage, on a machine with a GPU: python -m sparsekv.bench.policies OUT.jsonl [COMMIT]", file=sys.stderr)
        return 2
    begun = time.time()
    with Path(arguments[0]).open("w") as file:

        def keep(result: dict[str, Any]) -> None:
            if len(arguments) > 1:
                result["commit"] = arguments[1]
            file.write(json.dumps(result) + "\n")
            file.flush()
            brief = {k: v for k, v in result.items() if k not in ("kernels", "hardware", "torch", "threads", "commit")}
            print(f"[{time.time() - begun:.0f} s] {json.dumps(brief)}", flush=True)

        run(StepBench(shape_of(SHAPE), window=WINDOW, context=PROMPT, **DEVICE), keep)
    return 0


DEVICE: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


def run(bench: StepBench, keep: Callable[[dict[str, Any]], None]) -> None:
    """Steps first, then prompts."""
    for batch, context in STEPS:
        for name in NAMES:
            kernels = 20 if batch == 8 and name != "dms" else 0
            keep(bench.run(batch=batch, context=context, ratio=RATIO, policy=name, kernels=kernels))
        keep(bench.run(batch=batch, context=int(context / RATIO), ratio=1))  # dense over as many tokens as are held
        keep(bench.run(batch=batch, context=context, ratio=1))
    for name in PRUNING:
        keep(bench_prompt(bench, name, tokens=PROMPT, ratio=RATIO))


@torch.no_grad()
def bench_prompt(bench: StepBench, name: str, *, tokens: int, ratio: float) -> dict[str, Any]:
    """Seconds to read a prompt densely (with what the policy watches meanwhile) and to prune it to tokens / ratio;
    medians of two prompts after one."""
    dense, watched, pruned = [], [], []
    for name_ in ("dense", name):
        policy = Policy() if name_ == "dense" else bench.policy(name, tokens, ratio)
        bench.set_cache(
            policy, rows=3, tokens=tokens, pages=3 * bench.shape.layers * bench.shape.kv_heads * -(-tokens // 16)
        )
        for row in range(3):
            read = _timed(lambda row=row: _read(bench, row, tokens))
            (dense if name_ == "dense" else watched).append(read)
            rows = torch.tensor([row], device=bench.device)
            if name_ != "dense":
                pruned.append(_timed(lambda rows=rows: bench.cache.executor.finish_prompts(rows, tokens)))
    return {
        "bench": "prompt",
        "shape": bench.shape.name,
        "policy": name,
        "tokens": tokens,
        "ratio": ratio,
        "dense_s": min(dense[1:]),
        "read_s": min(watched[1:]),
        "prune_s": min(pruned[1:]),
        "prune_of_read": min(pruned[1:]) / min(dense[1:]),
        **environment(bench.device),
    }


def _read(bench: StepBench, row: int, tokens: int) -> None:
    rows = torch.tensor([row], device=bench.device)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        starts = torch.tensor([0, count], dtype=torch.int32, device=bench.device)
        seen = torch.full((1,), start, dtype=torch.int32, device=bench.device)
        batch = Batch(rows=rows, starts=starts, longest=count)
        bench.cache.parts = (None, Part(batch=batch, seen=seen, tokens=count, most=start + count))
        ids = torch.randint(0, bench.shape.vocabulary, (1, count), device=bench.device)
        positions = torch.arange(start, start + count, device=bench.device)[None]
        model: Any = bench.model
        model(input_ids=ids, position_ids=positions, past_key_values=bench.cache, use_cache=True, logits_to_keep=1)


def _timed(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
