"""bounds: what a page's keys can score at most, and the pages that a query reads by it (Quest, arXiv 2406.10774).

low[d], high[d] = the minimum and maximum of channel d over the keys that live in a page now. No key of the page scores
more than

    bound(q, page) = sum over d of max(q[d] * low[d], q[d] * high[d])

so the pages with the highest bounds hold the keys that matter most. A KV head's bound is the maximum over its group of
query heads (the paper's models have no groups). Bounds are recomputed from the page, never widened: where a slot is
overwritten they stay as tight as the keys allow.
"""

import dataclasses

from torch import Tensor

from sparsekv.ops.bounds import reference
from sparsekv.ops.layout import LayerPages, check_backend

BACKENDS = ("reference", "triton")


def refresh(layer: LayerPages, rows: Tensor, bounds: Tensor, *, longest: int, backend: str | None = None) -> None:
    """Recompute the bounds of every page that rows hold, after a prefill chunk.

    rows: int64 [B], -1 for padded places, which write nothing. bounds: [P + 1, 2, D] in the keys' type, minimum and
    maximum by physical page, written in place; index P belongs to no page. longest: at least the slots of the longest
    head, known to the host.

    Without a backend's name, Triton runs on CUDA (but float64 and odd page sizes: reference), the reference elsewhere.
    Raises ValueError where bounds do not fit the cache, or the backend asked for is unknown or cannot run.
    """
    _check_bounds(layer, bounds)
    if _backend(backend, layer) == "triton":
        from sparsekv.ops.bounds import triton

        triton.refresh(layer, rows, bounds, longest)
    else:
        reference.refresh(layer, rows, bounds, longest)


def refresh_written(
    layer: LayerPages, rows: Tensor, slots: Tensor | None, bounds: Tensor, *, backend: str | None = None
) -> None:
    """Recompute the bounds of the one page per head that holds slots int32 [B, H], after a decode step's `place`.

    None for the slots that `place` took by the ring rule (ops.layout.written). A slot of -1, or one that the head does
    not hold, writes nothing. Else as `refresh`.
    """
    _check_bounds(layer, bounds)
    if _backend(backend, layer) == "triton":
        from sparsekv.ops.bounds import triton

        triton.refresh_written(layer, rows, slots, bounds)
    else:
        reference.refresh_written(layer, rows, slots, bounds)


def select(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    bounds: Tensor,
    *,
    count: int,
    written: Tensor | None,
    longest: int,
    reads: Tensor | None = None,
    backend: str | None = None,
) -> LayerPages:
    """The pages that q [B, H * G, D] reads, as a layer whose rows are the places 0 .. B - 1 of the call.

    A head with at most `count` pages keeps them all. Else it keeps the page of slot `written` int32 [B, H] (-1: none is
    sure; None: as for `refresh_written`) and those of the others with the highest bounds, `count` in all; of equal
    bounds the lower page-table column. Bounds are summed in float32, float64 where q or the keys are. Columns stay in
    order, so that a partial last page stays last. `longest`, `bounds` and `backend` as in `refresh`; the kernels read
    no length on the host.

    reads: int64 [2, R + 1, H], an account by row to which the call adds the tokens of the pages that it chose, and the
    pages whose bounds it may have read, all that a head holds; it may be a part of a larger tensor.

    The result shares kv, free list and tickets with the layer. Its page table is int32 [B, H, count], undefined beyond
    a head's pages; its lengths are int32 [B, H], 0 for a row of -1; it has no ring. Read it by `decode` alone.

    Raises ValueError where q or bounds do not fit the cache, count is below 1, or the backend asked for is unknown or
    cannot run.
    """
    _check_bounds(layer, bounds)
    batch, heads, dim = rows.shape[0], layer.lengths.shape[1], layer.kv.shape[-1]
    if q.shape[0] != batch or q.shape[1] % heads or q.shape[2] != dim:
        raise ValueError(f"q is {tuple(q.shape)}; expected [{batch}, a multiple of {heads} heads, {dim}]")
    if count < 1:
        raise ValueError(f"count is {count}; a query reads at least 1 page")
    if _backend(backend, layer, q) == "triton":
        from sparsekv.ops.bounds import triton

        pages, lengths, seen = triton.select(layer, rows, q, bounds, count, written, longest, reads)
    else:
        pages, lengths, seen = reference.select(layer, rows, q, bounds, count, written, longest, reads)
    tickets = layer.tickets  # zero between calls: the first B serve the view, if there are so many
    return dataclasses.replace(
        layer,
        pages=pages,
        lengths=lengths,
        ring=layer.ring.new_empty(batch, heads, 0),
        seen=seen,
        tickets=None if tickets is None or len(tickets) < batch else tickets[:batch],
    )


def _check_bounds(layer: LayerPages, bounds: Tensor) -> None:
    shape, dtype = (layer.kv.shape[0] + 1, 2, layer.kv.shape[-1]), layer.kv.dtype
    if bounds.shape != shape or bounds.dtype != dtype:
        raise ValueError(f"bounds are {bounds.dtype} {tuple(bounds.shape)}; this cache needs {dtype} {shape}")


def _backend(backend: str | None, layer: LayerPages, *queries: Tensor) -> str:
    """The backend that runs."""
    if check_backend(backend, layer.kv.device, BACKENDS) == "triton":
        from sparsekv.ops.bounds import triton

        obstacle = triton.obstacle(layer, *queries)
        if obstacle is None:
            return "triton"
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    return "reference"
