"""draw in plain PyTorch: a sort of the vocabulary and a float64 softmax over it."""

import torch
from torch import Tensor

from sparsekv.ops.noise import uniform


def draw(
    logits: Tensor,
    noise: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """See api.draw."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    greedy = temperature == 0
    # The largest becomes 0 before the division, so that no temperature takes it beyond the numbers.
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1, temperature)[:, None]
    if filters is not None:
        scaled = cut(scaled, *filters)
    cumulative = scaled.double().softmax(-1).cumsum(-1)
    point = uniform(*noise)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(-1), tokens)


def cut(logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Minus infinity for tokens that the filters exclude. logits: [S, vocab]; the rest [S]. Keeps the largest."""
    ordered, order = torch.sort(logits, stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    out = ordered < ordered[:, :1] + min_p[:, None].log()
    out |= (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probabilities = ordered.masked_fill(out, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    out |= (before >= top_p[:, None]) & (top_p[:, None] < 1)
    out[:, 0] = False
    return logits.masked_fill(torch.empty_like(out).scatter_(-1, order, out), -torch.inf)
