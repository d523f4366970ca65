"""prefill: a chunk's queries over [what is stored] + [the chunk itself], before the chunk is placed.

Query at position q sees a key of birth position p with p <= q < expiry, where expiry = p + window if the key is marked,
else never (dms.visibility). Blocks in which nothing is visible cost nothing, so the work falls with the ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, check_backend
from sparsekv.ops.prefill import reference

if TYPE_CHECKING:
    from sparsekv.ops.prefill.triton import PrefillConfig

BACKENDS = ("reference", "triton")


@overload
def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    marks: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    config: PrefillConfig | None = None,
) -> Tensor: ...
@overload
def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    marks: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
    config: PrefillConfig | None = None,
) -> tuple[Tensor, Tensor]: ...
def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    marks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    config: PrefillConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend for T packed tokens. Writes nothing: call `place` afterwards.

    q: [T, H * G, D]; k, v: [T, H, D], keys after RoPE; marks: bool [T, H], aligned to their tokens. Returns
    [T, H * G, D], 0 for the tokens of a row of -1. return_lse: return with it the log-sum-exp of each query's scores,
    float32 (float64 for float64 queries) [T, H * G], -inf for the tokens of a row of -1. config: how the Triton kernel
    is cut, for benchmarks; None takes the tuned one.

    Without a backend's name, Triton runs on CUDA (but float64, head sizes that are no multiple of 16, and gradients:
    reference), the reference elsewhere. Raises ValueError for shapes that do not fit the cache, a scale that is not
    positive, marks in a layer without a ring, or a backend that is unknown or, asked for by name, cannot run.
    """
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    if k.shape[1:] != (heads, dim) or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[1] % heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit {heads} heads of {dim}"
        )
    if scale <= 0:
        raise ValueError(f"scale is {scale}; use a positive number, such as head_dim ** -0.5")
    if marks is not None and layer.window == 0:
        raise ValueError("marks need a layer with a ring: build the cache with a policy whose window is at least 1")
    if check_backend(backend, q.device, BACKENDS) == "triton":
        from sparsekv.ops.prefill import triton

        obstacle = triton.obstacle(layer, q, k, v)
        if obstacle is None:
            out, lse = triton.prefill(
                layer, batch, q, k, v, scale=scale, marks=marks, return_lse=return_lse, config=config
            )
            return out if lse is None else (out, lse)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    out, lse = reference.prefill(layer, batch, q, k, v, scale, marks, return_lse)
    return out if lse is None else (out, lse)
