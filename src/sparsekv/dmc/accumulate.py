"""The hard rule: running importance-weighted means of segments, where a segment is what lies in one slot.

key'[t] = sum of w[s] k[s] / z[t] over the s <= t of t's segment, z[t] = the sum of w[s], and likewise for values: what
the slot holds once token t is in it (arXiv 2403.09636, the accumulation step).

Two pieces of a segment join as z = z1 + z2, m = m2 + z1 / z (m1 - m2): means of means, never differences of long sums,
so nothing cancels. Joining a token's last d tokens with the d before them, for d = 1, 2, 4, ..., gives all tokens of a
chunk in log2(longest) steps.

Unlike the original's, these means have no window: at inference too it keeps the last 12 tokens of each head and takes
those that are older out of the mean. That is the same as this for segments of up to 12 tokens, and 11 tokens dearer.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Carry(NamedTuple):
    """The last slot of each sequence before a chunk, float32 (float64 where keys are): all that the next one needs."""

    z: Tensor
    """[B, H]: the sum of the importances in it; 0: there is no slot yet, and `key` and `value` are not read."""
    key: Tensor
    """[B, H, D]: the mean of its keys before RoPE."""
    value: Tensor
    """[B, H, D]."""


def accumulate(
    key: Tensor, value: Tensor, importance: Tensor, merge: Tensor, carry: Carry, *, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor, Carry]:
    """What the slot of each token holds when the token is in it, and the slots that the next chunk goes on with.

    key, value: [T, H, D] before RoPE, all sequences packed; importance: [T, H], positive; merge: bool [T, H], True:
    into the slot of the token before. A sequence's first token opens a slot whatever `merge` says. starts: int32
    [B + 1], tokens starts[i] .. starts[i + 1] - 1 are sequence i's; longest: at least the most tokens of one sequence,
    1 = a decode step (then T = B).

    Returns keys and values [T, H, D] in the types they came in, and the new carry. Works in float32, float64 for
    float64. No host synchronisation.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    z, mean = importance.to(dtype), torch.cat([key, value], dim=-1).to(dtype)
    prior, prior_mean = carry.z.to(dtype), torch.cat([carry.key, carry.value], dim=-1).to(dtype)
    if longest == 1:
        z, mean = _join(prior * merge, prior_mean, z, mean)
        last_z, last_mean = z, mean
    else:
        index = torch.arange(len(z), device=z.device, dtype=starts.dtype)
        row = torch.searchsorted(starts[1:], index, right=True)
        first = (index == starts[row])[:, None]
        z, mean = _join(prior[row] * (merge & first), prior_mean[row], z, mean)
        z, mean = _scan(z, mean, first | ~merge, longest)
        last, some = (starts[1:] - 1).clamp(min=0), (starts[1:] > starts[:-1])[:, None]
        last_z = torch.where(some, z[last], prior)
        last_mean = torch.where(some[..., None], mean[last], prior_mean)
    widths = [key.shape[-1], value.shape[-1]]
    keys, values = mean.split(widths, dim=-1)
    return keys.to(key.dtype), values.to(value.dtype), Carry(last_z, *last_mean.split(widths, dim=-1))


def _scan(z: Tensor, mean: Tensor, opens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Running sums [T, H] and means [T, H, D] of the segments that begin where `opens`, bool [T, H]."""
    index = torch.arange(len(z), device=z.device)[:, None]
    begin = torch.where(opens, index, 0).cummax(0).values
    d = 1
    while d < longest:
        before = torch.where(index[d:] - d >= begin[d:], z[:-d], 0)
        joined = _join(before, mean[:-d], z[d:], mean[d:])
        z, mean = (torch.cat([x[:d], y]) for x, y in zip((z, mean), joined, strict=True))
        d *= 2
    return z, mean


def _join(z1: Tensor, mean1: Tensor, z2: Tensor, mean2: Tensor) -> tuple[Tensor, Tensor]:
    """Both pieces as one. Where z1 is 0, mean1 is not read: it may be anything, of another sequence or undefined."""
    z = z1 + z2
    mean = mean2 + (z1 / z)[..., None] * (mean1 - mean2)
    return z, torch.where((z1 > 0)[..., None], mean, mean2)
