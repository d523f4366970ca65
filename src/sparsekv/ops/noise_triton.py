"""noise in Triton: what kernels call."""

import triton
import triton.language as tl

_GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB - 2**64)


@triton.jit
def mix(x):
    """SplitMix64 of int64 x: ops.noise.mix."""
    z = x + _GAMMA
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def unit(z):
    """float64 in [0, 1 - 2^-52] of the last mix: what ops.noise.uniform makes of it."""
    return ((z >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) * 2.0**-52
