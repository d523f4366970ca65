"""place: write new tokens' keys and values where the policy's rule says they go.

The ring rule: token t takes the slot of token t - W if that one was marked, else it is appended. A call with many
tokens per sequence (prefill) leaves what single steps would leave: marked tokens that no later query can see are never
stored, survivors are written compactly, oldest first.
"""

from torch import Tensor

from sparsekv.ops.layout import Batch, LaterMarks, LayerPages, LinearMarks, check_backend
from sparsekv.ops.place import reference
from sparsekv.ops.place.reference import align_marks

__all__ = ["BACKENDS", "align_marks", "place"]

BACKENDS = ("reference", "triton")


def place(
    layer: LayerPages,
    batch: Batch,
    k: Tensor,
    v: Tensor,
    *,
    marks: Tensor | LinearMarks | LaterMarks | None = None,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Store T tokens and advance `seen`, `lengths`, `ring`, page tables and the free list, in place.

    k, v: [T, H, D], keys after RoPE. marks: bool [T, H], True = forget after the window; None marks nothing;
    LinearMarks and LaterMarks (a decode step only) have the kernel of a decode step compute them.
    slots: int32 [B, H], decode only: the slot to overwrite, -1 to append; overrides the ring rule.

    Without a backend's name, Triton runs on CUDA, the reference elsewhere. The kernels never wait for the device, so
    they cannot raise where pages run short: tokens that found none are left out and `free_count` is negative from then
    on. The order of slots may differ between backends; what is stored does not.

    Raises ValueError for a marked token in a layer without a ring, or where the backend asked for is unknown or cannot
    run; from the reference, PoolExhausted, before anything is written, where the pool has too few free pages.
    """
    if marks is not None and layer.window == 0:
        raise ValueError("marks need a layer with a ring: build the cache with a policy whose window is at least 1")
    single = slots is not None or batch.longest == 1 and batch.rows.shape[0] == k.shape[0]
    if check_backend(backend, k.device, BACKENDS) == "triton":
        from sparsekv.ops.place import triton

        obstacle = triton.obstacle(layer)
        if obstacle is None:
            if single:
                triton.place_one(layer, batch.rows, k, v, marks, slots)
            else:
                triton.place_many(layer, batch, k, v, _computed(layer, batch, marks))
            return
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    if single:
        reference.place_one(layer, batch.rows, k, v, _computed(layer, batch, marks), slots)
    else:
        reference.place_many(layer, batch, k, v, _computed(layer, batch, marks))


def _computed(layer: LayerPages, batch: Batch, marks: Tensor | LinearMarks | LaterMarks | None) -> Tensor | None:
    if isinstance(marks, LaterMarks):
        return marks.marks(layer, batch.rows)
    return marks.marks() if isinstance(marks, LinearMarks) else marks
