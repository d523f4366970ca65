"""Whole forwards of one model, plain Transformers (DynamicCache + SDPA) beside SparseCache, interleaved in one process.

The two models share their weights. Without an adapter the marks are random at the ratio asked, every head with a share
of its own: speed depends on how many tokens are held where, not on which.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv.bench.timing import median
from sparsekv.modeling.attach import attach
from sparsekv.modeling.cache import SparseCache
from sparsekv.policies import Policy, Step
from sparsekv.provenance import environment

WINDOW = 64


class RandomMarks(Policy):
    """Marks at random so that a text of `tokens` tokens is held at `ratio`; a head keeps 0.2 to 1.8 times the mean."""

    name = "random-marks"

    def __init__(self, *, layers: int, kv_heads: int, tokens: int, ratio: float, seed: int = 0) -> None:
        if not 1 <= ratio < tokens / WINDOW:
            raise ValueError(
                f"the ratio is {ratio:g}; {tokens} tokens with a window of {WINDOW} allow 1 to {tokens / WINDOW:.4g}"
            )
        self._generator = torch.Generator().manual_seed(seed)
        mean = (tokens / ratio - WINDOW) / (tokens - WINDOW)
        spread = min(0.8, 1 / mean - 1)
        self.keep = mean * (1 + spread * (2 * torch.rand(layers, kv_heads, generator=self._generator) - 1))

    def window(self, layer: int) -> int:
        return WINDOW

    def marks(self, step: Step) -> Tensor:
        draw = torch.rand(step.key.shape[:2], generator=self._generator)
        return (draw > self.keep[step.layer]).to(step.key.device)


def pair(
    model: PreTrainedModel, *, ratio: float, adapter: str | None, tokens: int, seed: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(plain, attached): two models over the same weights; `model` becomes the attached one."""
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    plain.set_attn_implementation("sdpa")
    if adapter is not None:
        attach(model, adapter=adapter, cr=ratio)
        return plain, model
    config = model.config.get_text_config(decoder=True)
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    attach(model, policy=RandomMarks(layers=layers, kv_heads=kv_heads, tokens=tokens, ratio=ratio, seed=seed))
    return plain, model


@torch.inference_mode()
def bench_plain_decode(
    model: PreTrainedModel, ids: Tensor, *, ratio: float, adapter: str | None, steps: int, seed: int = 0
) -> dict[str, Any]:
    """Median milliseconds per decoded token, one step of each model in turn.

    ids: int64 [1, context + steps + 1]; the tokens after the context are those that are decoded, the first unmeasured.
    """
    context = ids.shape[1] - steps - 1
    plain, ours = pair(model, ratio=ratio, adapter=adapter, tokens=context, seed=seed)
    dense, sparse = DynamicCache(config=plain.config), SparseCache(ours)
    prompt, *rest = ids.split([context, *[1] * (steps + 1)], dim=1)
    plain(prompt, past_key_values=dense, logits_to_keep=1)
    ours(prompt, past_key_values=sparse, logits_to_keep=1)
    theirs, mine = iter(rest), iter(rest)
    times = _interleaved(
        [lambda: plain(next(theirs), past_key_values=dense), lambda: ours(next(mine), past_key_values=sparse)],
        ids.device,
        repeats=steps,
    )
    held = sparse.stats()
    dense_bytes = sum(getattr(layer, name).nbytes for layer in dense.layers for name in ("keys", "values"))
    return {
        "bench": "decode",
        "context": context,
        "ratio_asked": ratio,
        "ratio_held": held.compression_ratio,
        "marks": adapter or RandomMarks.name,
        **_compared(times),
        "dense_kv_bytes": dense_bytes,
        "kv_bytes": held.bytes,
        "steps": steps,
        "seed": seed,
        **environment(ids.device),
    }


@torch.inference_mode()
def bench_plain_prefill(
    model: PreTrainedModel, ids: Tensor, *, ratio: float, adapter: str | None, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Median milliseconds to read ids, int64 [1, tokens], in one chunk into an empty cache, each model in turn."""
    plain, ours = pair(model, ratio=ratio, adapter=adapter, tokens=ids.shape[1], seed=seed)
    times = _interleaved(
        [
            lambda: plain(ids, past_key_values=DynamicCache(config=plain.config), logits_to_keep=1),
            lambda: ours(ids, past_key_values=SparseCache(ours), logits_to_keep=1),
        ],
        ids.device,
        repeats=repeats,
    )
    return {
        "bench": "prefill",
        "tokens": ids.shape[1],
        "ratio_asked": ratio,
        "marks": adapter or RandomMarks.name,
        **_compared(times),
        "repeats": repeats,
        "seed": seed,
        **environment(ids.device),
    }


def _interleaved(runs: list[Callable[[], Any]], device: torch.device, *, repeats: int) -> list[list[float]]:
    """Milliseconds of each run, taken in turn; the first turn warms up and is not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                taken.append(1e3 * (time.perf_counter() - start))
    return times


def _compared(times: list[list[float]]) -> dict[str, float]:
    dense, ours = median(times[0]), median(times[1])
    return {"dense_ms": dense, "sparsekv_ms": ours, "speedup": dense / ours}
