"""A plan: everything about one model on one device at one batch, context and ratio.

Energy is the board's power limit over the predicted step: power x max(FLOPs / peak, bytes / bandwidth). A board draws
less than its limit where memory is what it waits for; a real step takes longer than predicted. Carbon and price follow
from energy and time; hosts, cooling and idle time are not in them.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from sparsekv.cost.fit import MAX_BATCH, MAX_CONTEXT, Limits, fits, largest_batch, largest_context
from sparsekv.cost.hardware import HARDWARE, Hardware
from sparsekv.cost.model import bytes_read, flops, kv_bytes, step_seconds, weight_bytes
from sparsekv.cost.shapes import ModelShape

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What energy and time cost, where known: grams of CO2 per kWh, and a price per hour of the device."""

    grams_per_kwh: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name.replace('_', ' ')} is {value:g}; it is a number of 0 or more")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one step, unless a name says otherwise. Bytes, seconds, joules."""

    ratio: float
    flops: float
    bytes_read: float
    kv_bytes: float
    kv_share: float
    """Of the bytes read."""
    memory: float
    """Weights, keys and values held."""
    fits: bool
    """Both limits kept."""
    bound: str
    """"bandwidth" or "compute": what the step waits for."""
    seconds: float
    tokens_per_second: float
    largest_batch: int
    """At this context, within the limits."""
    largest_context: int
    """At this batch, within the limits."""
    joules_per_token: float
    grams_per_million_tokens: float | None
    price_per_million_tokens: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan(
    shape: ModelShape,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    ratio: float = 1,
    limits: Limits | None = None,
    rates: Rates | None = None,
) -> Plan:
    """One step for `batch` sequences of `context` tokens at a compression ratio; limits: None = the device's memory.

    Raises ValueError for a number out of range, or weights that do not fit.
    """
    limits = limits or Limits(memory=hardware.memory)
    rates = rates or Rates()
    _check(shape, hardware, batch=batch, context=context, ratio=ratio, limits=limits)
    compute, bandwidth = step_seconds(shape, hardware, batch=batch, context=context, ratio=ratio)
    seconds = max(compute, bandwidth)
    kv = kv_bytes(shape, batch=batch, context=context, ratio=ratio)
    read = bytes_read(shape, batch=batch, context=context, ratio=ratio)
    joules = hardware.power * seconds / batch
    grams, price = rates.grams_per_kwh, rates.price_per_hour
    return Plan(
        ratio=ratio,
        flops=flops(shape, batch=batch, context=context, ratio=ratio),
        bytes_read=read,
        kv_bytes=kv,
        kv_share=kv / read,
        memory=weight_bytes(shape, held=True) + kv,
        fits=fits(shape, hardware, batch=batch, context=context, ratio=ratio, limits=limits),
        bound="compute" if compute > bandwidth else "bandwidth",
        seconds=seconds,
        tokens_per_second=batch / seconds,
        largest_batch=largest_batch(shape, hardware, context=context, ratio=ratio, limits=limits),
        largest_context=largest_context(shape, hardware, batch=batch, ratio=ratio, limits=limits),
        joules_per_token=joules,
        grams_per_million_tokens=None if grams is None else 1e6 * joules / _JOULES_PER_KWH * grams,
        price_per_million_tokens=None if price is None else 1e6 * seconds / batch / 3600 * price,
    )


def _check(shape: ModelShape, hardware: Hardware, *, batch: int, context: int, ratio: float, limits: Limits) -> None:
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; it is a number from 1 to {MAX_BATCH:,}")
    if not 1 <= context <= MAX_CONTEXT:
        raise ValueError(f"context is {context}; it is a number of tokens from 1 to {MAX_CONTEXT:,}")
    if not 1 <= ratio <= context:
        raise ValueError(f"the compression ratio is {ratio:g}; it is a number from 1 (dense) to the context's tokens")
    if not limits.seconds > 0:
        raise ValueError(f"the longest step is {limits.seconds:g} seconds; it is a number above 0")
    if limits.memory > hardware.memory:
        raise ValueError(
            f"a memory of {_gib(limits.memory)} is asked for and {hardware.name} has {_gib(hardware.memory)}; "
            "ask for less"
        )
    weights = weight_bytes(shape, held=True)
    if weights > limits.memory:
        larger = [other.name for other in HARDWARE.values() if other.memory >= weights]
        mend = f"plan for one with more ({', '.join(larger)})" if larger else "describe a larger one in a YAML file"
        raise ValueError(
            f"the weights of {shape.name} take {_gib(weights)} and the plan for {hardware.name} has "
            f"{_gib(limits.memory)} of memory; {mend}, or take a smaller model"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
