"""prefill: a chunk's queries over [what is stored] + [the chunk itself], before the chunk is placed.

Query at position q sees a key of birth position p with p <= q < expiry, where expiry = p + window if the key is marked,
else never (dms.visibility). Blocks in which nothing is visible cost nothing, so the work falls with the ratio.
"""

from torch import Tensor

from sparsekv.ops.layout import Batch, LayerPages, check_backend
from sparsekv.ops.prefill import reference

BACKENDS = ("reference",)


def prefill(
    layer: LayerPages,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    marks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend for T packed tokens. Writes nothing: call `place` afterwards.

    q: [T, H * G, D]; k, v: [T, H, D], keys after RoPE; marks: bool [T, H], aligned to their tokens. Returns
    [T, H * G, D].
    Raises ValueError for shapes that do not fit the cache, or an unknown backend.
    """
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    if k.shape[1:] != (heads, dim) or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[1] % heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit {heads} heads of {dim}"
        )
    check_backend(backend, q.device, BACKENDS)
    return reference.prefill(layer, batch, q, k, v, scale, marks)
