"""One uniform number per tuple of keys, such as (seed, sample, position), the same whatever else is in the batch.

The counter-based generator SplitMix64 (Steele, Lea & Flood 2014) as integer tensor arithmetic: no state, no host loop.

    z = x + 0x9e3779b97f4a7c15;  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;  z = (z ^ z >> 27) * 0x94d049bb133111eb
    mix(x) = z ^ z >> 31
    u = mix(mix(mix(first) + second) + third ...) >> 12, over 2^52
"""

from torch import Tensor

_GAMMA, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64 of int64 x [...], which wraps around."""
    z = x + _GAMMA
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def uniform(first: Tensor, *others: Tensor) -> Tensor:
    """Numbers in [0, 1 - 2^-52]: int64 keys that broadcast to one shape -> float64 of that shape."""
    bits = mix(first)
    for key in others:
        bits = mix(bits + key)
    return _shift(bits, 12).double() / 2.0**52
