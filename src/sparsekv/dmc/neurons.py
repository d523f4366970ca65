"""Where decisions and importances come from: one channel of keys and queries, which attention then does without.

logit[t] = k[t, c] - 5, of each KV head's key before RoPE: positive = merge. At the start of training no token does.
w[t] = sigmoid(mean over the group's query heads of q[t, c] + 5) + eps, before RoPE: nearly 1 at the start.

c is the last channel in the original's code (the first, some texts say). A first stage teaches the model to do without
it: the channel of *every* query and key head is faded out, before RoPE and again after, which turns its partner into
it; then the rows that make it are set to 0 in the projections, so that decisions start at -5 and importances at +5
exactly. In the second stage and at inference the channel is read before RoPE and is 0 to attention.

The original's models have no query or key norm; where to read the channel in a model with one is open.
"""

import torch
from torch import Tensor

from sparsekv import dms


def merge_logits(key: Tensor, *, channel: int = -1, scale: float = 1.0, offset: float = -5.0) -> Tensor:
    """scale * k[c] + offset; merge where positive. key: [..., kv_heads, head_dim]. Returns float32 [..., kv_heads].

    The original wants 0.00785 more than 0 of bfloat16 keys at inference, for its sigmoid rounds there; ours does not.
    """
    return dms.neuron_logits(key, key.shape[-2], channel=channel, scale=scale, offset=offset)


def importance(query: Tensor, kv_heads: int, *, channel: int = -1, scale: float = 1.0, offset: float = 5.0) -> Tensor:
    """sigmoid(scale * mean of q[c] over the group + offset) + eps of the queries' type, so that no mean divides by 0.

    query: [..., query_heads, head_dim], before RoPE. Returns float32 [..., kv_heads], positive.
    """
    neuron = query[..., channel].float().unflatten(-1, (kv_heads, -1)).mean(-1)
    return (neuron * scale + offset).sigmoid() + torch.finfo(query.dtype).eps


def zero_neuron_(states: Tensor, *, channel: int = -1, keep: float = 0.0) -> Tensor:
    """Zero, in place, the channel of every head, or leave it a share `keep` of its value in the first stage.

    states: queries or keys [..., heads, head_dim], returned. To be called before RoPE (once read) and after it.
    """
    return dms.zero_neuron_(states, states.shape[-2], channel=channel, keep=keep)


def neuron_keep(step: int, *, steps: int) -> float:
    """The share of the channel's value that is left at a step of the first stage, which has `steps`, 250 in the
    original: 1 at step 0, 0 from 0.8 * steps on."""
    return max(0.0, 1 - step / (0.8 * steps))
