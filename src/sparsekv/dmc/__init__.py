"""Dynamic Memory Compression as mathematics: pure functions on tensors (arXiv 2403.09636).

Token t either opens a slot of its own or merges into the slot of token t - 1, which then holds the importance-weighted
mean of all tokens merged into it. Each KV head decides for itself. Slots with token t in place of token t - 1 are what
Dynamic Memory Sparsification leaves with window 1 and lag 1, so whoever places DMC's means in a cache places them so.

Means are taken of keys *before* RoPE, and each mean is turned at the position of its newest token.

What is said here of "the original" was read off NVIDIA's Megatron-LM, branch dmc, commit d36bf8d (megatron/contrib/dmc,
examples/dmc). The paper's own text was not at hand: where it differs from its code, the code was followed.
"""

from sparsekv.dmc.accumulate import Carry, accumulate
from sparsekv.dmc.losses import compression_loss, straight_through
from sparsekv.dmc.neurons import importance, merge_logits, neuron_keep, zero_neuron_
from sparsekv.dmc.rope import BeforeRope, rotate
from sparsekv.dmc.soft import key_gate, soft_accumulate

__all__ = [
    "BeforeRope",
    "Carry",
    "accumulate",
    "compression_loss",
    "importance",
    "key_gate",
    "merge_logits",
    "neuron_keep",
    "rotate",
    "soft_accumulate",
    "straight_through",
    "zero_neuron_",
]
