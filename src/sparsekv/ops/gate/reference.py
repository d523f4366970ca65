"""gate in plain PyTorch: SDPA with a float mask, one KV head at a time so that the mask stays [B, S, S]."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def gate(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor | None, window: int, scale: float, documents: Tensor | None
) -> Tensor:
    """See api.gate."""
    heads, length = k.shape[1], k.shape[2]
    index = torch.arange(length, device=q.device)
    age = index[:, None] - index
    allowed = (age >= 0)[None]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    if log_keep is not None and log_keep.requires_grad and not q.requires_grad:
        q = q.detach().requires_grad_()  # CUDA's SDPA keeps what a mask's gradient needs for those of q, k and v alone
    outs = []
    for h, q_head in enumerate(q.chunk(heads, dim=1)):
        mask = bias
        if log_keep is not None:
            mask = bias + torch.where(age >= window, log_keep[:, h, None, :].to(q.dtype), 0)
        k_head, v_head = (x[:, h : h + 1].expand(-1, q_head.shape[1], -1, -1) for x in (k, v))
        outs.append(scaled_dot_product_attention(q_head, k_head, v_head, mask[:, None], scale=scale))
    return torch.cat(outs, dim=1)
