"""gate: whole-sequence attention with a per-key gate, differentiable: what training and cache-free forwards run.

score[q, k] = scale * q . k + (log_keep[k] if q - k >= window else 0), minus infinity where k > q or the two tokens lie
in different documents (arXiv 2506.05345, equation 2). Minus infinity for a marked token gives the hard rule.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsekv.ops.gate import flex, reference
from sparsekv.ops.layout import check_backend

BACKENDS = ("reference", "flex", "triton")


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

    Backends: "reference" (SDPA with a float mask), "flex" (compiled FlexAttention, CUDA only: on the CPU it gives no
    gradient to log_keep) and "triton" (bfloat16, float16 or float32, head sizes that are a multiple of 16 up to 256;
    the same bits every time). None picks triton on CUDA where it can run, else the reference, and SDPA's own causal
    kernel where there is neither a gate nor a document to keep apart. Raises ValueError for a backend that is unknown
    or, asked for by name, cannot run.
    """
    if backend is None and log_keep is None and documents is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    chosen = check_backend(backend, q.device, BACKENDS)
    if chosen == "triton":
        from sparsekv.ops.gate import triton

        obstacle = triton.obstacle(q, k, v)
        if obstacle is None:
            return triton.gate(q, k, v, log_keep, window, scale, documents)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    if chosen == "flex":
        if not q.is_cuda:
            raise ValueError(
                "the flex backend needs CUDA: on the CPU it gives no gradient to the gate; use 'reference'"
            )
        return flex.gate(q, k, v, log_keep, window, scale, documents)
    return reference.gate(q, k, v, log_keep, window, scale, documents)
