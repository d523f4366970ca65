"""Who sees whom: the rule of delayed eviction, hard (inference) and soft (training).

Hard   key k is visible to query q  iff  k <= q and (not e[k] or q - k < w), with e[k] = (z[k + lag] > 0).
       Equivalently iff k <= q < expiry[k], with expiry[k] = k + w where e[k], else never.
Soft   l = (z + g) / tau with g logistic noise (the difference of two Gumbels), alpha = sigmoid(l); attention adds
       log(1 - alpha[k]) = logsigmoid(-l[k]) to the score of k where q - k >= w (arXiv 2506.05345, equations 1 and 2).
"""

import torch
from torch import Tensor


def marks(logits: Tensor) -> Tensor:
    """e = (z > 0): bool, True = forget. logits: any shape, aligned to the tokens they decide (see `align`)."""
    return logits > 0


def align(per_position: Tensor, lag: int, *, fill: float | bool) -> Tensor:
    """Move what position k + lag decided to token k; the last `lag` tokens, still undecided, get `fill`.

    per_position: [..., tokens]. Returns the same shape.
    """
    if lag == 0:
        return per_position
    pad = torch.full_like(per_position[..., :lag], fill)
    return torch.cat([per_position[..., lag:], pad], dim=-1)


def visible(query_position: Tensor, key_position: Tensor, key_mark: Tensor, window: int) -> Tensor:
    """The hard rule, broadcast over its arguments: int, int, bool -> bool."""
    age = query_position - key_position
    return (age >= 0) & (~key_mark | (age < window))


def logistic(shape: tuple[int, ...], *, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """g ~ Logistic(0, 1), the difference of two Gumbels, float32."""
    u = torch.rand(shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return u.log() - (-u).log1p()


def log_keep(gate: Tensor) -> Tensor:
    """log(1 - alpha) = logsigmoid(-l): what attention adds to the score of a key past its window."""
    return torch.nn.functional.logsigmoid(-gate)


def hard_log_keep(mark: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The hard counterpart of `log_keep`: minus infinity where marked, else 0."""
    return torch.zeros(mark.shape, dtype=dtype, device=mark.device).masked_fill_(mark, -torch.inf)
