"""decode: one query per sequence over everything its heads hold.

out = softmax(scale * q K^T) V over the live slots of (row, head). Run it after `place`: what a token may no longer see
is no longer stored, so no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sparsekv.ops.decode import reference
from sparsekv.ops.layout import LayerPages, check_backend

if TYPE_CHECKING:
    from sparsekv.ops.decode.triton import DecodeConfig

BACKENDS = ("reference", "triton")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What `decode` returns."""

    out: Tensor
    """[B, H * G, D], the query's dtype."""
    lse: Tensor | None = None
    """float32 (float64 for float64 queries) [B, H * G]: log-sum-exp of the scores, -inf where a head holds nothing."""


def decode(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    *,
    scale: float,
    return_lse: bool = False,
    backend: str | None = None,
    config: DecodeConfig | None = None,
) -> Decoded:
    """Attend from q [B, H * G, D] over the slots of rows int64 or int32 [B]; 0 where nothing is held or a row is -1.

    config: how the Triton kernel is cut, for benchmarks; None takes the tuned one.

    Without a backend's name, Triton runs on CUDA (but float64 and odd page sizes: reference), the reference elsewhere.
    Raises ValueError where q's shape does not fit the cache, or the backend asked for is unknown or cannot run.
    """
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    if q.shape[0] != rows.shape[0] or q.shape[1] % heads or q.shape[2] != dim:
        raise ValueError(f"q is {tuple(q.shape)}; expected [{rows.shape[0]}, a multiple of {heads} heads, {dim}]")
    if check_backend(backend, q.device, BACKENDS) == "triton":
        from sparsekv.ops.decode import triton

        obstacle = triton.obstacle(layer, q)
        if obstacle is None:
            out, lse = triton.decode(layer, rows, q, scale, config)
            return Decoded(out=out, lse=lse if return_lse else None)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    out, lse = reference.decode(layer, rows, q, scale, with_lse=return_lse)
    return Decoded(out=out, lse=lse)
