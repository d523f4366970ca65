"""What DMC reads of a token before RoPE, as one tensor, and RoPE itself: means are taken before it and turned after.

rotate(x)[t] = x[t] cos[t] + rotate_half(x[t]) sin[t], channel i turning with channel i + D / 2, as Llama's. Where cos
and sin of a channel are 0, so is the channel of what is turned.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class BeforeRope(NamedTuple):
    """Of each token; `...` are any leading dimensions."""

    merge: Tensor
    """[..., H]: the logit of merging into the slot before, see neurons.merge_logits."""
    importance: Tensor
    """[..., H]: its weight in the mean, positive."""
    key: Tensor
    """[..., H, D]: before RoPE, the neuron's channel 0."""
    cos: Tensor
    """[..., D]: RoPE at the token's position."""
    sin: Tensor
    """[..., D]."""

    def pack(self) -> Tensor:
        """[..., H * (2 + D) + 2 * D]: float32, float64 for float64 keys; the logits come first."""
        dtype = torch.promote_types(self.key.dtype, torch.float32)
        parts = (self.merge, self.importance, self.key.flatten(-2), self.cos, self.sin)
        return torch.cat([x.to(dtype) for x in parts], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor, heads: int, dim: int) -> Self:
        """What `pack` made of `heads` KV heads of size `dim`."""
        merge, importance, key, cos, sin = packed.split([heads, heads, heads * dim, dim, dim], dim=-1)
        return cls(merge, importance, key.unflatten(-1, (heads, dim)), cos, sin)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of states [..., heads, D] at the positions of cos and sin [..., D]."""
    low, high = states.chunk(2, dim=-1)
    return states * cos[..., None, :] + torch.cat([-high, low], dim=-1) * sin[..., None, :]
