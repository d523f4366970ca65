"""By how much sequences will have grown when they hold most, as far as the ends so far tell."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekv.engine.schedule.request import Sequence


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """For sequences that run, in the order in which they are expected to end."""

    left: NDArray[np.float64]
    """Tokens until each ends."""
    gone: NDArray[np.int64]
    """Tokens that those before each had written, and give back."""
    written: int
    """Tokens, by all of them."""
    growing: float
    """Heads of each, in the mean, that are not at their caps."""

    @staticmethod
    def of(running: Collection[Sequence], *, expected: float, least: int, growing: int) -> "Outlook":
        """Each is expected to write `expected` tokens in all, and at least so many more, unless its request has fewer.
        growing: heads of all together that are not at their caps."""
        written = np.array([s.sampled for s in running], dtype=np.int64)
        most = np.array([s.request.most_new for s in running], dtype=np.int64) - written
        left = np.minimum(np.maximum(expected - written, least), most)
        order = left.argsort()
        written = written[order]
        return Outlook(
            left=left[order],
            gone=written.cumsum() - written,
            written=int(written.sum()),
            growing=growing / max(1, len(running)),
        )

    def tokens(self, more: int, each: float) -> float:
        """The most that all will have grown by, with `more` that begin and write `each`.

        Where the k that end first have written w_1 ... w_k tokens until now and the next of n ends r tokens from now,
        the others have grown by (n - k) r tokens and w_1 + ... + w_k are given back.
        """
        last = more * each - self.written
        if not len(self.left):
            return last
        return max(last, float(((np.arange(len(self.left), 0, -1) + more) * self.left - self.gone).max()))
