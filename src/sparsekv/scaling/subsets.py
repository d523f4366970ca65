"""What W of n chains are right about, in the mean over the subsets of W: so one draw of n serves every W up to n.

pass@all  at least one of W is right: 1 - C(n - c, W) / C(n, W) where c of n are (Chen et al. 2021, arXiv 2107.03374)
vote      the answer of the largest weight is right, a tie shared among its answers
best      the chain of the highest score is right, a tie shared

Arrays: right bool [..., n]; answers int [..., n], equal numbers for equal answers, -1 for none; weights float [..., n].
All give float64 [...]. Subsets are all of them where they are few, else SUBSETS drawn with a fixed seed.
"""

from functools import cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

SUBSETS = 128
Answers = NDArray[np.int64]


def passes(right: NDArray[np.bool_], width: int) -> NDArray[np.float64]:
    """Exact. Raises ValueError for a width above n."""
    n = _count(right, width)
    table = np.array([1 - comb(n - c, width) / comb(n, width) for c in range(n + 1)])
    return table[right.sum(-1)]


def votes(
    answers: Answers, right: NDArray[np.bool_], width: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """By majority, or by weights of 0 or more. Raises ValueError for a width above n."""
    chosen = subsets(_count(right, width), width)  # [S, n]
    valid = answers >= 0
    same = (answers[..., :, None] == answers[..., None, :]) & valid[..., :, None]  # [..., n, n]
    voices = chosen if weights is None else chosen * weights[..., None, :]
    weight = voices @ same.astype(np.float64)  # [..., S, n]: that of each chain's answer
    repeats = chosen @ same.astype(np.float64)
    return _right_at_top(weight, chosen & valid[..., None, :], right, per=1 / np.maximum(repeats, 1))


def best(scores: NDArray[np.float64], answers: Answers, right: NDArray[np.bool_], width: int) -> NDArray[np.float64]:
    """Of the chains with an answer. Raises ValueError for a width above n."""
    chosen = subsets(_count(right, width), width)
    standing = chosen & (answers >= 0)[..., None, :]
    value = np.broadcast_to(scores[..., None, :], standing.shape)
    return _right_at_top(value, standing, right, per=np.ones(standing.shape))


@cache
def subsets(n: int, width: int) -> NDArray[np.bool_]:
    """bool [S, n]: which chains."""
    if comb(n, width) <= SUBSETS:
        picked = np.array(list(combinations(range(n), width)))
    else:
        picked = np.random.default_rng(0).permuted(np.tile(np.arange(n), (SUBSETS, 1)), axis=1)[:, :width]
    mask = np.zeros((len(picked), n), dtype=bool)
    np.put_along_axis(mask, picked, True, axis=1)
    return mask


def _count(right: NDArray[np.bool_], width: int) -> int:
    n = right.shape[-1]
    if not 1 <= width <= n:
        raise ValueError(f"{width} chains of {n} drawn; draw more, or ask for 1 to {n}")
    return n


def _right_at_top(
    value: NDArray[np.float64], standing: NDArray[np.bool_], right: NDArray[np.bool_], *, per: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The right part of those of the largest value among the standing, each counting `per`; 0 where none stands. Mean
    over the subsets, [..., S, n] -> [...]."""
    value = np.where(standing, value, -np.inf)
    top = np.where(standing & (value == value.max(-1, keepdims=True)), per, 0.0)
    total = top.sum(-1)
    return ((top * right[..., None, :]).sum(-1) / np.where(total > 0, total, 1.0)).mean(-1)
