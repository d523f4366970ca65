"""One clear sentence for a value that is out of range."""

import math
from typing import Any


def check_int(name: str, value: Any, *, at_least: int | None) -> None:
    """Raises ValueError unless value is an integer (not a bool) and not below at_least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; use an integer")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} is {value}; use at least {at_least}")


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Raises ValueError unless value is a finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; use a number")
    if not low <= value <= high:
        span = f"at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; use {span}")
