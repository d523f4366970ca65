"""place: write new tokens' keys and values where the policy's rule says they go.

The ring rule: token t takes the slot of token t - W if that one was marked, else it is appended. A call with many
tokens per sequence (prefill) leaves what single steps would leave: marked tokens that no later query can see are never
stored, survivors are written compactly, oldest first.
"""

from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, check_backend
from sparsekv.ops.place import reference
from sparsekv.ops.place.reference import align_marks

__all__ = ["BACKENDS", "align_marks", "place"]

BACKENDS = ("reference",)


def place(
    layer: LayerPages,
    batch: Batch,
    k: Tensor,
    v: Tensor,
    *,
    marks: Tensor | None = None,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Store T tokens and advance `seen`, `lengths`, `ring`, page tables and the free list, in place.

    k, v: [T, H, D], keys after RoPE. marks: bool [T, H], True = forget after the window; None marks nothing.
    slots: int32 [B, H], decode only: the slot to overwrite, -1 to append; overrides the ring rule.

    Raises PoolExhausted, before anything is written, where the pool has too few free pages; ValueError for a marked
    token in a layer without a ring or an unknown backend.
    """
    if marks is not None and layer.window == 0:
        raise ValueError("marks need a layer with a ring: build the cache with a policy whose window is at least 1")
    check_backend(backend, k.device, BACKENDS)
    if slots is not None or batch.longest == 1 and batch.rows.shape[0] == k.shape[0]:
        reference.place_one(layer, batch.rows, k, v, marks, slots)
    else:
        reference.place_many(layer, batch, k, v, marks)
