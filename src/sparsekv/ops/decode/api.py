"""decode: one query per sequence over everything its heads hold.

out = softmax(scale * q K^T) V over the live slots of (row, head). Run it after `place`: what a token may no longer see
is no longer stored, so no mask is needed.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekv.ops.decode import reference
from sparsekv.ops.layout import LayerPages, check_backend

BACKENDS = ("reference",)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What `decode` returns."""

    out: Tensor
    """[B, H * G, D], the query's dtype."""
    lse: Tensor | None = None
    """float32 (float64 for float64 queries) [B, H * G]: log-sum-exp of the scores, -inf where a head holds nothing."""
    weights: Tensor | None = None
    """[B, H * G, longest head]: each slot's attention weight, 0 beyond a head's length."""


def decode(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    *,
    scale: float,
    return_lse: bool = False,
    return_weights: bool = False,
    backend: str | None = None,
) -> Decoded:
    """Attend from q [B, H * G, D] over the slots of rows int64 [B]. A head with nothing stored gives 0.

    Raises ValueError where q's shape does not fit the cache, or for an unknown backend.
    """
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    if q.shape[0] != rows.shape[0] or q.shape[1] % heads or q.shape[2] != dim:
        raise ValueError(f"q is {tuple(q.shape)}; expected [{rows.shape[0]}, a multiple of {heads} heads, {dim}]")
    check_backend(backend, q.device, BACKENDS)
    out, lse, weights = reference.decode(layer, rows, q, scale, return_weights)
    return Decoded(out=out, lse=lse if return_lse else None, weights=weights)
