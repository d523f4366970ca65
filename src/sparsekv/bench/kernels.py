"""The attention kernels alone, at the live lengths that a compression ratio leaves: `decode` and `prefill`.

Bytes are those of the live keys and values; bandwidth is compared with a copy in the same run.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsekv.bench.fill import fill, spread_lengths
from sparsekv.bench.shapes import Shape
from sparsekv.bench.timing import copy_bandwidth, graph_ms
from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import batch_of
from sparsekv.ops.prefill import prefill
from sparsekv.provenance import environment

L2_BYTES = 128 * 2**20
"""Rotating over inputs of at least this size leaves nothing of one call in the cache for the next."""


def bench_decode(
    shape: Shape, *, batch: int, context: int, ratio: float, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """One layer's decode attention for `batch` sequences of `context` tokens held at `ratio`."""
    generator = torch.Generator().manual_seed(seed)
    mean = context / ratio
    layer_bytes = 2 * batch * shape.kv_heads * mean * shape.head_dim * dtype.itemsize
    layers = min(64, max(2, math.ceil(L2_BYTES / layer_bytes))) if device.type == "cuda" else 1
    longest = math.ceil(min(context, 8 * mean))
    lengths = torch.stack(
        [spread_lengths(batch * shape.kv_heads, mean, longest, generator) for _ in range(layers)]
    ).view(layers, batch, shape.kv_heads)
    pages = int((-(-lengths // 32)).sum())
    pool = PagePool(pages, page_size=32, head_dim=shape.head_dim, dtype=dtype, device=device)
    ragged = RaggedCache(pool, [0] * layers, kv_heads=shape.kv_heads, rows=batch, max_tokens=longest)
    fill(ragged, lengths, generator)
    q = torch.randn(batch, shape.query_heads, shape.head_dim, device=device, dtype=dtype)
    rows = torch.arange(batch, device=device)
    views = [ragged.layer(i) for i in range(layers)]
    scale = shape.head_dim**-0.5
    ms = graph_ms([lambda v=v: decode(v, rows, q, scale=scale) for v in views], device)
    live = int(lengths.sum()) * 2 * shape.head_dim * dtype.itemsize / layers
    copy = copy_bandwidth(device)
    return {
        "bench": "decode",
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "ratio": ratio,
        "us": 1e3 * ms,
        "bytes": live,
        "bytes_per_s": live / ms * 1e3,
        "copy_bytes_per_s": copy,
        "of_copy": live / ms * 1e3 / copy,
        "seed": seed,
        **environment(device),
    }


def bench_prefill(
    shape: Shape, *, tokens: int, ratio: float, window: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """One layer's prefill attention over `tokens` fresh tokens, beside causal SDPA (cuDNN on CUDA) over the same."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = shape.kv_heads, shape.head_dim
    pool = PagePool(1, page_size=32, head_dim=dim, dtype=dtype, device=device)
    ragged = RaggedCache(pool, [window], kv_heads=heads, rows=1, max_tokens=tokens)
    q = torch.randn(tokens, shape.query_heads, dim, device=device, dtype=dtype)
    k, v = (torch.randn(tokens, heads, dim, device=device, dtype=dtype) for _ in range(2))
    kept = max(tokens / ratio - window, 1)
    survivors = spread_lengths(heads, kept, tokens, generator) if ratio > 1 else torch.full((heads,), tokens)
    chance = 1 - survivors / tokens
    marks = (torch.rand(tokens, heads, generator=generator) < chance).to(device)
    batch = batch_of(torch.arange(1, device=device), [tokens])
    scale = dim**-0.5
    ours = graph_ms([lambda: prefill(ragged.layer(0), batch, q, k, v, scale=scale, marks=marks)], device)
    group = shape.query_heads // heads
    dense_q = q.transpose(0, 1)[None].contiguous()
    dense_k, dense_v = (x.transpose(0, 1)[None].repeat_interleave(group, 1).contiguous() for x in (k, v))

    def dense() -> Tensor:
        return scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True, scale=scale)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext():
        theirs = graph_ms([dense], device)
    return {
        "bench": "prefill",
        "shape": shape.name,
        "tokens": tokens,
        "ratio": ratio,
        "window": window,
        "marked": marks.float().mean().item(),
        "ms": ours,
        "sdpa_ms": theirs,
        "speedup": theirs / ours,
        "seed": seed,
        **environment(device),
    }
