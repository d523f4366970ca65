"""95 % intervals: Wilson's for shares of things that are right or wrong, the bootstrap for everything else.

Wilson, of k in n, z = 1.96:  (k + z^2/2 -+ z sqrt(k (n - k) / n + z^2/4)) / (n + z^2).  Bootstrap: the 2.5th and 97.5th
percentile of the statistic over DRAWS resamplings of the units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
Z = 1.959964


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score and the interval that holds it in 95 of 100 repetitions."""

    value: float
    low: float | None
    high: float | None
    interval: str
    """Which one: "wilson", "bootstrap over" what, or "none" and why."""

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})")


def share(values: ArrayLike, *, unit: str = "items") -> Estimate | None:
    """The mean of values: by Wilson where each is 0 or 1, else bootstrapped; None without values."""
    scores = np.asarray(values, dtype=np.float64)
    if not len(scores):
        return None
    if set(scores.tolist()) <= {0.0, 1.0}:
        return wilson(int(scores.sum()), len(scores))
    return bootstrap(scores, np.ones_like(scores), unit=unit)


def wilson(right: int, count: int) -> Estimate:
    """Of `right` in `count` > 0."""
    middle, spread = right + Z**2 / 2, Z * math.sqrt(right * (count - right) / count + Z**2 / 4)
    low, high = ((middle + sign * spread) / (count + Z**2) for sign in (-1, 1))
    return Estimate(value=right / count, low=max(low, 0.0), high=min(high, 1.0), interval="wilson")


def bootstrap(
    sums: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    unit: str,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda mean: mean,
) -> Estimate:
    """statistic(sum of sums / sum of weights) over units [n], resampled; monotone statistics alone make sense."""
    count = len(sums)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    low, high = np.quantile(statistic(drawn @ sums / (drawn @ weights)), [0.025, 0.975]).tolist()
    value = float(statistic(np.asarray(sums.sum() / weights.sum())))
    return Estimate(value=value, low=low, high=high, interval=f"bootstrap over {unit}")
