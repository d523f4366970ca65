"""The host's account of the pool: what is surely free, and what a step may take at most.

The device's lengths and free count arrive one step late. A head of length n that sees k more tokens takes at most
ceil(min(n + k, cap) / C) - ceil(n / C) pages, whatever the policy does with them, so the account is an upper bound of
what is used, exact whenever no step is in flight. A policy with a budget caps what a head holds from the end of the
prompt on; the prompt itself it reads densely.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Caps:
    """The most slots that a head of each layer holds."""

    in_prompt: Sequence[int]
    """While a prompt is read, of any length."""
    held: Callable[[int, int], Sequence[int]]
    """(tokens of the prompt, of the whole sequence) -> by layer, once the prompt is over."""
    prunes: Sequence[bool]
    """By layer: whether its prompts are read densely and pruned when they are over."""
    max_tokens: int
    """Of a sequence."""


class Ledger:
    """lengths: int32 [layers, rows, kv_heads] as last reported; free: pages then free."""

    def __init__(self, *, caps: Caps, rows: int, kv_heads: int, page_size: int, pages: int) -> None:
        layers = len(caps.in_prompt)
        self.lengths: Lengths = np.zeros((layers, rows, kv_heads), dtype=np.int32)
        self.free = self.pages = pages
        self.page_size = page_size
        self.heads = layers * kv_heads
        """Heads of one sequence, over all layers."""
        self._kv_heads = kv_heads
        self._caps = caps
        self._in_prompt = _by_layer(caps.in_prompt)
        self._held = _by_layer(caps.held(0, caps.max_tokens))
        self._prompts = np.zeros(rows, dtype=np.int32)
        self._decodes = np.zeros(rows, dtype=np.int32)
        self._in_flight: deque[tuple[list[int], dict[int, int]]] = deque()

    def issue(self, decodes: list[int], chunks: dict[int, int]) -> None:
        """A step that places a token in each row of decodes, and chunks[row] tokens of a prompt in others, has been
        given to the device."""
        self._in_flight.append((decodes, chunks))
        self._decodes[decodes] += 1
        for row, count in chunks.items():
            self._prompts[row] += count

    def settle(self, lengths: Lengths, free: int) -> None:
        """The oldest step in flight is done, and left this."""
        self.lengths, self.free = lengths, free
        decodes, chunks = self._in_flight.popleft()
        self._decodes[decodes] -= 1
        for row, count in chunks.items():
            self._prompts[row] -= count

    def refresh(self, lengths: Lengths, free: int) -> None:
        """Rows were freed, forked or swapped while no step was in flight."""
        assert not self._in_flight
        self.lengths, self.free = lengths, free

    def available(self) -> int:
        """Pages that are surely free, whatever the steps in flight take."""
        rows = (self._prompts + self._decodes).nonzero()[0]
        return self.free - int((self._pages(self._bound(rows)) - self._pages(self.lengths[:, rows])).sum())

    def surely_fits(self, rows: int) -> bool:
        """Whether a decode step of so many rows fits even where it, and all in flight, take a page a head. Cheap; not
        so, nothing is known."""
        prompts = int(self._prompts.sum())
        steps = rows + int(self._decodes.sum())
        return self.free >= self.heads * (steps + prompts)

    def growth(self, rows: list[int], decodes: int) -> int:
        """The pages that `rows` take at most in so many more decode steps."""
        before, after = self._bound(rows), self._bound(rows, decodes=decodes)
        return int((self._pages(after) - self._pages(before)).sum())

    def growth_of_prompt(self, row: int, tokens: int) -> int:
        """The pages that a row takes at most in `tokens` more tokens of its prompt."""
        before, after = self._bound([row]), self._bound([row], prompt=tokens)
        return int((self._pages(after) - self._pages(before)).sum())

    def fit(self, row: int, tokens: int, pages: int) -> int:
        """The largest number of a prompt's tokens up to `tokens` that surely fit in `pages` pages."""
        if self.growth_of_prompt(row, tokens) <= pages:
            return tokens
        low, high = 0, tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.growth_of_prompt(row, middle) <= pages else (low, middle)
        return low

    def growth_from(self, lengths: Lengths, decodes: int) -> int:
        """As growth, for a row that is not in the pool: lengths int32 [layers, kv_heads]."""
        now = lengths[:, None]
        return int((self._pages(_grown(now, np.int32(decodes), self._held)) - self._pages(now)).sum())

    def estimate(self, prompt: int, tokens: int, ratio: float) -> int:
        """The pages of a sequence of `tokens` tokens, `prompt` of them the prompt, at a compression ratio."""
        return self._estimate(tokens, ratio, self._caps.held(prompt, tokens))

    def estimate_prompt(self, tokens: int, ratio: float) -> int:
        """The pages of a prompt of `tokens` tokens before it is pruned."""
        ratios = np.where(self._caps.prunes, 1.0, ratio)
        return self._estimate(tokens, ratios, self._caps.in_prompt)

    def held_in_prompt(self, held: int, tokens: int) -> int:
        """The slots over all heads once a prompt's last `tokens` tokens were read, before it was pruned, where `held`
        were held before them; 0 where nothing is pruned: lengths tell."""
        if not any(self._caps.prunes):
            return 0
        return held + tokens * self._kv_heads * sum(self._caps.prunes)

    def _estimate(self, tokens: int, ratio: float | NDArray[np.float64], caps: Sequence[int]) -> int:
        held = np.minimum(np.ceil(tokens / ratio), caps).astype(np.int32)
        return int(self._pages(held).sum()) * self._kv_heads

    def _bound(self, rows: list[int] | NDArray[np.int64], *, prompt: int = 0, decodes: int = 0) -> Lengths:
        """What heads hold at most after what is in flight and so many tokens more: int32 [layers, rows, kv_heads]."""
        prompts, steps = (x[rows] + np.int32(more) for x, more in ((self._prompts, prompt), (self._decodes, decodes)))
        found = self.lengths[:, rows]
        for tokens, caps in ((prompts, self._in_prompt), (steps, self._held)):
            if tokens.any():
                found = _grown(found, tokens[:, None], caps)
        return found

    def _pages(self, lengths: Lengths) -> Lengths:
        return -(-lengths // np.int32(self.page_size))


def _by_layer(caps: Sequence[int]) -> Lengths:
    return np.asarray(caps, dtype=np.int32)[:, None, None]


def _grown(lengths: Lengths, tokens: Lengths | np.int32, caps: Lengths) -> Lengths:
    return np.maximum(lengths, np.minimum(lengths + tokens, caps))
