"""gate: whole-sequence attention with a per-key gate, differentiable: what training and cache-free forwards run.

score[q, k] = scale * q . k + (log_keep[k] if q - k >= window else 0), minus infinity where k > q or the two tokens lie
in different documents (arXiv 2506.05345, equation 2). Minus infinity for a marked token gives the hard rule.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekv.ops.gate import flex, reference
from sparsekv.ops.layout import check_backend

BACKENDS = ("reference", "flex")


def gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    *,
    window: int,
    scale: float,
    documents: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """q: [B, H * G, S, D]; k, v: [B, H, S, D]; log_keep: float [B, H, S] or None (no gate); documents: int [B, S],
    equal where two tokens may see each other (padding is a document of its own). Returns [B, H * G, S, D].

    Backends: "reference" (SDPA with a float mask) and "flex" (compiled FlexAttention, CUDA only: on the CPU it gives no
    gradient to log_keep); None picks flex on CUDA, and SDPA's own causal kernel where there is neither a gate nor a
    document to keep apart. Raises ValueError for flex on the CPU or an unknown backend.
    """
    if backend is None and log_keep is None and documents is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    chosen = check_backend(backend or ("flex" if q.is_cuda else "reference"), q.device, BACKENDS)
    if chosen == "flex":
        if not q.is_cuda:
            raise ValueError(
                "the flex backend needs CUDA: on the CPU it gives no gradient to the gate; use 'reference'"
            )
        return flex.gate(q, k, v, log_keep, window, scale, documents)
    return reference.gate(q, k, v, log_keep, window, scale, documents)
