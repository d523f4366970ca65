"""gate with compiled FlexAttention (CUDA): a block mask for causality and documents, a score_mod for the gate only."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def gate(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor | None, window: int, scale: float, documents: Tensor | None
) -> Tensor:
    """See api.gate."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    if documents is None:
        block_mask = _causal(length, q.device)
    else:

        def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (documents[b, i] == documents[b, j])

        block_mask = create_block_mask(same_document, q.shape[0], None, length, length, device=q.device)
    keep = None if log_keep is None else log_keep.float()

    def past_window(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if keep is None else torch.where(i - j >= window, score + keep[b, h // group, j], score)

    out = _compiled()(q, k, v, score_mod=past_window, block_mask=block_mask, scale=scale, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out
