"""The host's account of the pool: what is surely free, and what a step may take at most.

The device's lengths and free count arrive one step late. A head of length n that sees k more tokens takes at most
ceil(min(n + k, cap) / C) - ceil(n / C) pages, whatever the policy does with them, so the account is an upper bound of
what is used, exact whenever no step is in flight.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]


class Ledger:
    """lengths: int32 [layers, rows, kv_heads] as last reported; free: pages then free; caps: per layer, the slots that
    a head holds at most."""

    def __init__(self, *, layers: int, rows: int, kv_heads: int, page_size: int, pages: int, caps: list[int]) -> None:
        self.lengths: Lengths = np.zeros((layers, rows, kv_heads), dtype=np.int32)
        self.free = self.pages = pages
        self.page_size = page_size
        self.heads = layers * kv_heads
        """Heads of one sequence, over all layers."""
        self._kv_heads = kv_heads
        self._caps = np.asarray(caps, dtype=np.int64)[:, None, None]
        self._issued = np.zeros(rows, dtype=np.int64)
        self._in_flight: deque[dict[int, int]] = deque()

    def issue(self, tokens: dict[int, int]) -> None:
        """A step that places tokens[row] tokens in each row has been given to the device."""
        self._in_flight.append(tokens)
        for row, count in tokens.items():
            self._issued[row] += count

    def settle(self, lengths: Lengths, free: int) -> None:
        """The oldest step in flight is done, and left this."""
        self.lengths, self.free = lengths, free
        for row, count in self._in_flight.popleft().items():
            self._issued[row] -= count

    def refresh(self, lengths: Lengths, free: int) -> None:
        """Rows were freed, forked or swapped while no step was in flight."""
        assert not self._in_flight
        self.lengths, self.free = lengths, free

    def available(self) -> int:
        """Pages that are surely free, whatever the steps in flight take."""
        rows = self._issued.nonzero()[0]
        now = self.lengths[:, rows]
        taken = self._pages(self._bound(now, self._issued[rows])) - self._pages(now)
        return self.free - int(taken.sum())

    def growth(self, rows: list[int], tokens: int) -> int:
        """The pages that `rows` take at most in `tokens` more tokens each."""
        now, issued = self.lengths[:, rows], self._issued[rows]
        before, after = self._bound(now, issued), self._bound(now, issued + tokens)
        return int((self._pages(after) - self._pages(before)).sum())

    def fit(self, row: int, tokens: int, pages: int) -> int:
        """The largest number of tokens up to `tokens` that surely fit in `pages` pages."""
        if self.growth([row], tokens) <= pages:
            return tokens
        low, high = 0, tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.growth([row], middle) <= pages else (low, middle)
        return low

    def growth_from(self, lengths: Lengths, tokens: int) -> int:
        """As growth, for a row that is not in the pool: lengths int32 [layers, kv_heads]."""
        now = lengths[:, None]
        return int((self._pages(self._bound(now, np.asarray([tokens]))) - self._pages(now)).sum())

    def estimate(self, tokens: int, ratio: float) -> int:
        """The pages of a sequence of `tokens` tokens at a compression ratio, every head alike."""
        held = np.minimum(np.ceil(tokens / ratio).astype(np.int64), self._caps)
        return int(self._pages(held).sum()) * self._kv_heads

    def _bound(self, lengths: Lengths, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.maximum(lengths, np.minimum(lengths + tokens[:, None], self._caps))

    def _pages(self, lengths: NDArray[np.int64] | Lengths) -> NDArray[np.int64]:
        return -(-lengths.astype(np.int64) // self.page_size)
