"""draw: one token for each row of logits, from the softmax at its temperature over what its filters keep.

    kept by min_p: p(token) >= min_p * max p;  by top_k: the k largest;  then by top_p: the smallest set of the most
    probable whose mass is at least top_p of what the others kept. Of equal logits the first in the vocabulary are kept.
    token = the first at which the cumulative mass, in vocabulary order, exceeds u * (all of it)

with u = noise.uniform(seed, sample, position). Temperature 0 takes the largest logit.
"""

import torch
from torch import Tensor

from sparsekv.ops.draw import reference
from sparsekv.ops.layout import check_backend

BACKENDS = ("reference", "triton")


def draw(
    logits: Tensor,
    noise: tuple[Tensor, Tensor, Tensor],
    *,
    temperature: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """logits: [S, vocab]; noise: seed, sample and position, int64 [S]; temperature: float32 [S], 0 = greedy; filters:
    min_p float32, top_k int64 and top_p float32 [S], 0, 0 and 1 where off, or None. Returns int64 [S].

    The host never waits. Without a backend's name, Triton runs on CUDA (but float64: reference), the reference
    elsewhere; the two agree but where float32's rounding decides. Raises ValueError where the shapes do not fit, or the
    backend asked for is unknown or cannot run.
    """
    rows = (logits.shape[0],)
    if logits.ndim != 2 or any(x.shape != rows for x in (*noise, temperature, *(filters or ()))):
        raise ValueError(f"logits are {tuple(logits.shape)}; expected [S, vocab] and all else [S]")
    if check_backend(backend, logits.device, BACKENDS) == "triton":
        if logits.dtype in (torch.float32, torch.bfloat16, torch.float16):
            from sparsekv.ops.draw import triton

            return triton.draw(logits, noise, temperature, filters)
        if backend == "triton":
            raise ValueError(f"backend 'triton' takes logits of at most 32 bits, not {logits.dtype}; use 'reference'")
    return reference.draw(logits, noise, temperature, filters)
