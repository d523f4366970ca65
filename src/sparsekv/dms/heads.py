"""Eviction logits: one number per token and KV head that says how forgettable the token is.

linear source   z[t] = w . h[t] + b, h the input of the attention layer (after its input norm); w = 0 and b = -5 at
                the start, so that nothing is marked (arXiv 2506.05345, section 3.1).
neuron source   z[t] = scale * q[t, c] + offset, q the first query head of each group before RoPE, c one channel of it
                (scale 100 and offset -5 in NVIDIA's checkpoints): no new parameters, but attention must do
                without the channel, which is zeroed before and after RoPE.

Logits are float32 whatever the model's dtype: a mark is a hard decision, and bfloat16 would move it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INITIAL_BIAS = -5.0


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z = W h + b in float32, under autocast too.

    hidden: [..., hidden_size] any float dtype; weight: [kv_heads, hidden_size]; bias: [kv_heads].
    Returns float32 [..., kv_heads].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.float(), weight.float(), bias.float())


def neuron_logits(
    query: Tensor, kv_heads: int, *, channel: int = -1, scale: float = 100.0, offset: float = -5.0
) -> Tensor:
    """z = scale * q[c] + offset, read from the first query head of each group before RoPE.

    query: [..., query_heads, head_dim]. Returns float32 [..., kv_heads].
    """
    group = query.shape[-2] // kv_heads
    return query[..., ::group, channel].float() * scale + offset


def zero_neuron_(query: Tensor, kv_heads: int, *, channel: int = -1, keep: float = 0.0) -> Tensor:
    """Zero, in place, the channel that `neuron_logits` reads, or leave it a share `keep` of its value while a model is
    taught to do without. query: [..., query_heads, head_dim], returned."""
    neuron = query[..., :: query.shape[-2] // kv_heads, channel]
    if keep:
        neuron.mul_(keep)
    else:
        neuron.zero_()
    return query


@dataclass(frozen=True, kw_only=True)
class NeuronSource:
    """How a checkpoint's queries carry the logits. Raises ValueError for what is no number."""

    channel: int = -1
    """Of the first query head of each group; negative from the end."""
    scale: float = 100.0
    offset: float = -5.0
    rezero: bool = True
    """Whether the channel is zeroed again after RoPE, which turns its partner into it."""

    def __post_init__(self) -> None:
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (self.scale, self.offset))
        if type(self.channel) is not int or not numbers or type(self.rezero) is not bool:
            raise ValueError(f"{self} needs an integer channel, finite scale and offset, and rezero true or false")


class EvictionHead(nn.Module):
    """The linear source of one attention layer: weight [kv_heads, hidden_size] and bias [kv_heads], float32."""

    shared = False
    """In training: one logit for all KV heads, the mean of theirs. Rows that begin alike stay alike."""

    def __init__(self, hidden_size: int, kv_heads: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kv_heads, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.full((kv_heads,), INITIAL_BIAS, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden_size] -> logits float32 [..., kv_heads]."""
        if self.shared:
            logits = linear_logits(hidden, self.weight.mean(0, keepdim=True), self.bias.mean(0, keepdim=True))
            return logits.expand(*logits.shape[:-1], len(self.bias))
        return linear_logits(hidden, self.weight, self.bias)
