"""The host's account of the pool: what is surely free, and what a step may take at most.

The device's lengths and free count arrive one step late. A head of length n that sees k more tokens takes at most
ceil(min(n + k, cap) / C) - ceil(n / C) pages, whatever the policy does with them, so the account is an upper bound of
what is used, exact whenever no step is in flight. A policy with a budget caps what a head holds from the end of the
prompt on; the prompt itself it reads densely.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass(kw_only=True)
class _Issued:
    """A step in flight, and what has been done to rows behind it, which its report knows nothing of."""

    decodes: list[int]
    chunks: dict[int, int]
    changes: list[tuple[list[int], Lengths | int, int]] = field(default_factory=list)
    """Rows, what each head holds since (int32 [layers, 1, kv_heads], or 0), and the pages taken for it."""


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
        self._in_flight: deque[_Issued] = deque()
        self._left: Lengths | None = None
        """Slots left in the last page of each head, once someone has asked; lengths' shape."""

    def issue(self, decodes: list[int], chunks: dict[int, int]) -> None:
        """A step that places a token in each row of decodes, and chunks[row] tokens of a prompt in others, has been
        given to the device."""
        self._in_flight.append(_Issued(decodes=decodes, chunks=chunks))
        self._decodes[decodes] += 1
        for row, count in chunks.items():
            self._prompts[row] += count

    def settle(self, lengths: Lengths, free: int) -> None:
        """The oldest step in flight is done, and left this."""
        self.lengths, self.free, self._left = lengths, free, None
        step = self._in_flight.popleft()
        self._decodes[step.decodes] -= 1
        for row, count in step.chunks.items():
            self._prompts[row] -= count
        for rows, held, pages in step.changes:
            self._change(rows, held, pages)

    def refresh(self, lengths: Lengths, free: int) -> None:
        """What the device holds while no step is in flight."""
        assert not self._in_flight
        self.lengths, self.free, self._left = lengths, free, None

    def emptied(self, rows: list[int]) -> None:
        """Rows were emptied behind what is in flight. Others may own some of their pages, so all count as taken until a
        later step, or `refresh`, tells how many are free."""
        self._change_behind(rows, 0, 0)

    def filled(self, row: int, lengths: Lengths, pages: int) -> None:
        """An empty row was filled behind what is in flight: lengths int32 [layers, kv_heads], in so many pages."""
        self._change_behind([row], lengths[:, None], pages)

    def _change_behind(self, rows: list[int], held: Lengths | int, pages: int) -> None:
        self._change(rows, held, pages)
        for step in self._in_flight:
            step.changes.append((rows, held, pages))

    def _change(self, rows: list[int], held: Lengths | int, pages: int) -> None:
        self.lengths[:, rows], self._left = held, None
        self.free -= pages

    def available(self) -> int:
        """Pages that are surely free, whatever the steps in flight take."""
        return self.free - self._beyond((self._prompts + self._decodes).nonzero()[0])

    def surely_fits(self, rows: int) -> bool:
        """Whether a decode step of so many rows fits even where it, and all in flight, take a page a head. Cheap; not
        so, nothing is known."""
        prompts = int(self._prompts.sum())
        steps = rows + int(self._decodes.sum())
        return self.free >= self.heads * (steps + prompts)

    def growth(self, rows: Sequence[int] | NDArray[np.int64], decodes: int) -> int:
        """The pages that `rows` take at most in so many more decode steps."""
        rows = np.asarray(rows, dtype=np.int64)
        return self._beyond(rows, decodes) - self._beyond(rows)

    def _beyond(self, rows: NDArray[np.int64], decodes: int = 0) -> int:
        """The pages that `rows` take at most beyond what was reported, in what is in flight and so many decode steps
        more."""
        steps = self._decodes[rows] + np.int32(decodes)
        many = (self._prompts[rows] > 0) | (steps > self.page_size)
        few, some = rows[~many], rows[many]
        found = int((self._pages(self._bound(some, decodes=decodes)) - self._pages(self.lengths[:, some])).sum())
        for count in np.unique(steps[~many & (steps > 0)]).tolist():
            found += int(self._taken(count)[few[steps[~many] == count]].sum())
        return found

    def _taken(self, decodes: int) -> NDArray[np.int32]:
        """int32 [rows]: the pages that each row takes at most in so many decode steps, no more than a page has slots,
        after what was reported. A head takes one where its last page has fewer slots left, unless that page holds all
        it will ever hold."""
        if self._left is None:
            slots = self._pages(self.lengths) * np.int32(self.page_size)
            self._left = np.where(slots < self._held, slots - self.lengths, np.int32(self.page_size))
        return (self._left < decodes).sum(0, dtype=np.int32).sum(1, dtype=np.int32)

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

    def growing(self, rows: list[int]) -> int:
        """How many heads of rows, as last reported, are not at their caps."""
        if (self._held >= self._caps.max_tokens).all():
            return self.heads * len(rows)
        return int((self.lengths[:, rows] < self._held).sum())

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
