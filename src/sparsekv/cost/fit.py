"""What fits a memory and a latency: the largest batch, the longest context, and W chains of L tokens at a ratio."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsekv.cost.hardware import Hardware
from sparsekv.cost.model import kv_bytes, step_seconds, weight_bytes
from sparsekv.cost.shapes import ModelShape

MAX_BATCH, MAX_CONTEXT = 1 << 20, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes for weights, keys and values; seconds for one step."""

    memory: float
    seconds: float = math.inf


def fits(shape: ModelShape, hardware: Hardware, *, batch: int, context: int, ratio: float, limits: Limits) -> bool:
    """Whether a step keeps to both limits."""
    held = weight_bytes(shape, held=True) + kv_bytes(shape, batch=batch, context=context, ratio=ratio)
    seconds = max(step_seconds(shape, hardware, batch=batch, context=context, ratio=ratio))
    return held <= limits.memory and seconds <= limits.seconds


def largest_batch(shape: ModelShape, hardware: Hardware, *, context: int, ratio: float, limits: Limits) -> int:
    """Sequences of `context` tokens that fit; 0 where not even one does, MAX_BATCH at most."""
    return _largest(
        lambda batch: fits(shape, hardware, batch=batch, context=context, ratio=ratio, limits=limits), MAX_BATCH
    )


def largest_context(shape: ModelShape, hardware: Hardware, *, batch: int, ratio: float, limits: Limits) -> int:
    """Tokens for each of `batch` sequences; 0 where not even one token fits, MAX_CONTEXT at most."""
    return _largest(
        lambda context: fits(shape, hardware, batch=batch, context=context, ratio=ratio, limits=limits), MAX_CONTEXT
    )


def chains(
    shape: ModelShape, hardware: Hardware, *, contexts: Sequence[int], ratios: Sequence[float], limits: Limits
) -> list[dict[str, float]]:
    """For every L and CR the most parallel chains W that fit when all have reached L tokens; fewer always fit."""
    return [
        {
            "context": context,
            "ratio": ratio,
            "chains": largest_batch(shape, hardware, context=context, ratio=ratio, limits=limits),
        }
        for context in contexts
        for ratio in ratios
    ]


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest of 1..most for which `holds`, which is true up to some number and false above it; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
