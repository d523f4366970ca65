"""Plain Transformers' decode step at the same shape: DynamicCache and StaticCache with SDPA, filled at random."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sparsekv.bench.shapes import Shape
from sparsekv.bench.timing import graph_ms, median_ms
from sparsekv.provenance import environment

KINDS = ("DynamicCache", "StaticCache")


@torch.no_grad()
def bench_transformers_step(
    model: PreTrainedModel, shape: Shape, *, batch: int, context: int, kind: str
) -> dict[str, Any]:
    """Median milliseconds of one decode step of an unattached model. DynamicCache runs eagerly, as it must;
    StaticCache is recorded in a CUDA graph where there is one. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown cache {kind!r}; use one of {', '.join(KINDS)}")
    parameter = next(model.parameters())
    device = parameter.device
    size = (batch, shape.kv_heads, context, shape.head_dim)
    cache = DynamicCache(config=model.config)
    if kind == "StaticCache":
        cache = StaticCache(config=model.config, max_cache_len=context + 64)
    for layer in range(shape.layers):
        k, v = (torch.randn(size, dtype=parameter.dtype, device=device) for _ in range(2))
        cache.update(k, v, layer)
    ids = torch.randint(0, shape.vocabulary, (batch, 1), device=device)
    position = torch.full((batch, 1), context, device=device)

    def step() -> Tensor:
        return model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits

    static = kind == "StaticCache"
    ms = graph_ms([step], device, repeats=3) if static else median_ms(step, device, warmup=1, repeats=3)
    return {
        "bench": "transformers step",
        "cache": kind,
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "ms": ms,
        **environment(device),
    }
