"""What heads keep, counted: by kind of token and layer, by age, and by head.

Tokens in the window are held whatever was decided, so kinds leave them out.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

FIRST = 4
"""Tokens at the beginning, to which attention drains off."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of some tokens is held."""

    name: str
    tokens: int
    held: float
    """Mean over layers and heads."""
    by_layer: list[float]


def kinds_of(pieces: list[str]) -> list[str]:
    """The kind of each piece of a text."""
    kinds, before = [], " "
    for index, piece in enumerate(pieces):
        kinds.append("first tokens" if index < FIRST else _kind(piece, before))
        before = piece or before
    return kinds


def by_kind(held: Tensor, pieces: list[str], *, window: int) -> list[Share]:
    """held: bool [layers, kv_heads, tokens]. The kinds that the text has, those kept most first."""
    settled = max(len(pieces) - window, 0) or len(pieces)
    kinds = np.array(kinds_of(pieces)[:settled])
    found = [_share(name, held[..., :settled], kinds == name) for name in sorted(set(kinds))]
    return sorted(found, key=lambda share: -share.held)


def by_age(held: Tensor) -> list[Share]:
    """The share of tokens by how long ago they were read, in doubling spans."""
    age = held.shape[-1] - 1 - np.arange(held.shape[-1])
    found, low, high = [], 0, 16
    while low < held.shape[-1]:
        found.append(_share(f"{low} to {min(high, len(age)) - 1}", held, (age >= low) & (age < high)))
        low, high = high, 2 * high
    return found


def sorted_heads(held: Tensor) -> np.ndarray:
    """float64 [layers, kv_heads]: the share of the text that each head holds, the largest of a layer first."""
    return -np.sort(-held.double().mean(-1).numpy(), axis=-1)


def _share(name: str, held: Tensor, chosen: np.ndarray) -> Share:
    by_layer = held.numpy()[..., chosen].mean((1, 2))
    return Share(name=name, tokens=int(chosen.sum()), held=float(by_layer.mean()), by_layer=by_layer.tolist())


def _kind(piece: str, before: str) -> str:
    word = piece.strip()
    if not word:
        return "line break" if "\n" in piece else "space"
    if any(character.isdigit() for character in word):
        return "number"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if not piece[0].isspace() and before[-1].isalnum():
        return "inside a word"
    return "capitalised word" if word[0].isupper() else "word"
