"""weigh: how much attention each stored slot gets, the column sums that attention-based eviction decides by.

sums[slot] = sum over queries and the group of softmax(scale * q K^T)[slot]. Run it after `place` (TOVA arXiv
2401.06104: the last query; H2O arXiv 2306.14048: all so far; SnapKV arXiv 2404.14469: the last 32 of the prompt).
"""

from __future__ import annotations

from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, check_backend
from sparsekv.ops.weigh import reference

BACKENDS = ("reference", "triton")


def weigh(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    *,
    scale: float,
    longest: int,
    lse: Tensor | None = None,
    into: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum the attention weights of each row's last queries, by slot.

    q: [T, H * G, D]: the last counts[i] queries of row rows[i], in order of arrival, whose keys are the last counts[i]
    slots of each head. Query j of n sees all slots but the last n - 1 - j.
    longest: N, how many slots of each head are wanted; those beyond are left out.
    lse: float32 (float64 for float64 queries) [T, H * G]: log-sum-exp of each query's scores, as `decode` and `prefill`
    return it. None: computed here, in one more pass over the keys.
    into: what is remembered of slots, [P + 1, C] of the type below (cache.state): the sums are added there instead, in
    place, and it is what is returned. A fork must not share the pages.

    Returns float32 (float64 for float64 queries) [B, H, N], 0 beyond a head's length and for rows of -1. From exp(score
    - lse), so with a relative error of float32's epsilon times |lse|.

    Without a backend's name, Triton runs on CUDA (but float64 and odd page sizes: reference), the reference elsewhere.
    Raises ValueError for shapes that do not fit the cache or each other, a layer with a ring (it overwrites slots, so
    that their order says nothing of arrival), or a backend that is unknown or, asked for by name, cannot run.
    """
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    if q.ndim != 3 or q.shape[1] % heads or q.shape[2] != dim:
        raise ValueError(f"q is {tuple(q.shape)}; expected [tokens, a multiple of {heads} heads, {dim}]")
    if batch.longest == 1 and q.shape[0] != batch.rows.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens; a decode step has one for each of its {len(batch.rows)} rows")
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(
            f"lse is {tuple(lse.shape)}; expected {tuple(q.shape[:2])}, one number for each query and head"
        )
    if layer.window:
        raise ValueError("weigh needs a layer without a ring: build the cache with a policy whose window is 0")
    if into is not None and (into.shape != (layer.kv.shape[0] + 1, layer.page_size) or not into.is_contiguous()):
        expected = (layer.kv.shape[0] + 1, layer.page_size)
        raise ValueError(f"into is {tuple(into.shape)}; this cache needs {expected}, contiguous")
    if check_backend(backend, q.device, BACKENDS) == "triton":
        from sparsekv.ops.weigh import triton

        obstacle = triton.obstacle(layer, q)
        if obstacle is None:
            return triton.weigh(layer, batch, q, scale, longest, lse, into)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    return reference.weigh(layer, batch, q, scale, longest, lse, into)
