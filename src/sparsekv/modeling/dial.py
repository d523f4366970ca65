"""The dial of trained heads: which offset on their logits gives which compression ratio to a sequence of T tokens.

An offset marks about the same share of the tokens wherever they stand, and a window of w tokens is always held, so what
is held grows linearly with T, and the ratio with it towards 1 / (unmarked share). Between the lengths that were
measured, and beyond them, what an offset holds is a line through (w, w) and the measured points.
"""

import bisect
import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache

log = logging.getLogger(__name__)

SLACK = 0.0125
"""A ratio may exceed the table's last by this share of it: calibration stops within 1 % of what it aims at."""


@dataclass(frozen=True, kw_only=True)
class OffsetTable:
    """What was measured."""

    window: int
    """Tokens that are held whatever was decided."""
    offsets: list[tuple[float, float]] = field(default_factory=list)
    """(offset on the logits, compression ratio at `length`), ascending in both."""
    length: int | None = None
    """Tokens; None = not known, and then the ratios are taken for every length."""
    ratios: dict[int, list[float]] = field(default_factory=dict)
    """By further length: the ratio of each of the same offsets."""

    def at(self, tokens: int) -> list[tuple[float, float]]:
        """(offset, ratio) for sequences of `tokens` tokens, ascending in both: of rows with one ratio, the first."""
        if self.length is None or tokens == self.length:
            return self.offsets
        rows: list[tuple[float, float]] = []
        for row, (offset, ratio) in enumerate(self.offsets):
            measured = {self.length: ratio} | {length: ratios[row] for length, ratios in self.ratios.items()}
            found = tokens / self._held(measured, tokens)
            if not rows or found > rows[-1][1]:
                rows.append((offset, found))
        return rows

    def offset_for(self, ratio: float, *, tokens: int | None = None) -> float:
        """The offset that gives sequences of `tokens` tokens (None: of `length`) a compression ratio; -inf (dense) for
        1. A ratio that so short a sequence cannot have gets the offset of `length`, with a warning in the log.

        Raises ValueError for a ratio below 1 or beyond the table, and without a table.
        """
        if not ratio >= 1:
            raise ValueError(f"the compression ratio is {ratio}; it is tokens seen over tokens held, so use 1 or more")
        if ratio == 1:
            return -math.inf
        if not self.offsets:
            raise ValueError("this adapter has no table of ratios; run `sparsekv calibrate` on it, or leave out cr")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens is {tokens}; it is the length that cr is meant for, so use 1 or more")
        rows = self.offsets if tokens is None else self.at(tokens)
        if serves(ratio, most=rows[-1][1]):
            return _interpolate(rows, ratio)
        if tokens is None or not serves(ratio, most=self.offsets[-1][1]):
            where = "" if tokens is None else f" at {tokens} tokens"
            raise ValueError(f"the compression ratio is {ratio}; this adapter holds up to {rows[-1][1]:.4g}{where}")
        _warn(self._short(ratio, tokens, most=rows[-1][1]))
        return _interpolate(self.offsets, ratio)

    def _held(self, measured: dict[int, float], tokens: int) -> float:
        """Tokens held of `tokens`. measured: ratio by length, of one offset."""
        if tokens <= self.window:
            return tokens
        points = {self.window: float(self.window)}
        points |= {length: length / ratio for length, ratio in measured.items() if length > self.window}
        lengths = sorted(points)
        right = min(max(bisect.bisect_left(lengths, tokens), 1), len(lengths) - 1)
        low, high = lengths[right - 1], lengths[right]
        held = points[low] + (tokens - low) / (high - low) * (points[high] - points[low])
        return min(max(held, self.window), tokens)

    def _short(self, ratio: float, tokens: int, *, most: float) -> str:
        least = math.ceil(ratio * self.window)
        reason = f"this adapter holds up to {most:.3g} at {tokens} tokens"
        if tokens < least:
            reason = f"the window of {self.window} is held whatever the heads decide"
            reason = f"below {least} tokens none has it, since {reason}"
        return f"a ratio of {ratio:g} is out of reach: {reason}; the dial stands where {self.length} tokens have it"


def serves(ratio: float, *, most: float) -> bool:
    """Whether a dial that was measured up to the ratio `most` serves a ratio."""
    return ratio <= most * (1 + SLACK)


def _interpolate(rows: list[tuple[float, float]], ratio: float) -> float:
    """The offset at a ratio, linear between rows and beyond the ends."""
    offsets, ratios = zip(*rows, strict=True)
    if len(rows) == 1:
        if abs(ratio / ratios[0] - 1) > SLACK:
            raise ValueError(f"the compression ratio is {ratio}; this adapter's table knows only {ratios[0]:.4g}")
        return offsets[0]
    right = min(max(bisect.bisect_left(ratios, ratio), 1), len(rows) - 1)
    share = (ratio - ratios[right - 1]) / (ratios[right] - ratios[right - 1])
    return offsets[right - 1] + share * (offsets[right] - offsets[right - 1])


@lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Once each."""
    log.warning(message)
