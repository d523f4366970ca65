"""Which sequences run in the next step: continuous batching, chunked prefill, a token budget and a page budget.

Decodes first, all of them; then prompts in order of arrival, in chunks of what the budgets leave. The pool cannot run
dry inside a step: each step is planned with the most pages that it can take. Where decodes alone do not surely fit, the
latest sequence is swapped to host memory; it comes back before anything new is let in. What was forked comes back
without the pages that it shared, so swaps cost room as well as time. A newcomer must leave what keeps them rare: a page
per head for each running sequence, which is a step of the worst case, and half of the pages by which all will have
grown at the worst moment, if each writes as much as those that have ended did in the mean. A prompt of several samples
starts when as many rows are free, a sixteenth of all at most, and pages for them, so that they fork on the device.

It decides and does nothing: no torch here. The engine carries out an action and asks again.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparsekv.engine.schedule.ledger import Ledger
from sparsekv.engine.schedule.outlook import Outlook
from sparsekv.engine.schedule.request import Request, Sequence, Status

SCORED = 128
"""Tokens of prompts with log-probabilities in a step: each takes a row of logits."""

WRITTEN = 512
"""Tokens that a sequence is expected to write before any has ended. 592 chains of 1,040 over a pool for 80, in
simulation, moved 0.60 tokens by swaps for each one written with 128, 0.33 with 512, 0.22 with 1,024, and took more
steps with 128 only; more would keep short answers waiting."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`count` tokens of a prompt, from `start` on."""

    sequence: Sequence
    start: int
    count: int
    samples: list[Sequence]
    """Where the prompt is complete: the samples that start from it, this sequence first. Else empty."""

    @property
    def scored(self) -> int:
        """How many of its tokens are asked what they say of the prompt's next."""
        request = self.sequence.request
        return min(self.count, len(request.prompt) - 1 - self.start) if request.scored else 0


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One forward: a token of each of `decodes`, and chunks of prompts."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[int]:
        """Of the decodes."""
        return [s.row_() for s in self.decodes]

    @cached_property
    def samples(self) -> list[Sequence]:
        """The sequences that get a token, in order: decodes, then every sample of each prompt that is complete."""
        return self.decodes + [s for chunk in self.chunks for s in chunk.samples]


@dataclass(frozen=True, kw_only=True)
class SwapOut:
    sequence: Sequence


@dataclass(frozen=True, kw_only=True)
class SwapIn:
    rows: list[tuple[Sequence, int]]
    """Each with the row that it gets."""


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """The pool cannot hold one token more of this sequence, though it is alone."""

    sequence: Sequence


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Read back the step in flight first."""


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Nothing to do."""


Action = RunStep | SwapOut | SwapIn | GiveUp | Settle | Idle


class Scheduler:
    """ledger: the account of the pool; max_tokens: the token budget of a step; ratio: the compression ratio to expect
    before any has been measured."""

    def __init__(self, ledger: Ledger, *, rows: int, max_tokens: int, ratio: float = 1.0) -> None:
        self.ledger = ledger
        self.rows = rows
        self.max_tokens = max_tokens
        self.ratio = ratio
        self.best_ratio = ratio
        self.written: float = WRITTEN
        """Tokens that a sequence writes until it ends: the mean over about as many ends as sequences run."""
        self._outlook: Outlook | None = None
        """As it was when this step's first newcomer asked."""
        self.free_rows = list(range(rows - 1, -1, -1))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []

    # What comes and goes

    def add(self, sequence: Sequence) -> None:
        """A sequence that waits or is swapped out."""
        insort(self.swapped if sequence.status is Status.SWAPPED else self.waiting, sequence, key=_priority)

    def start(self, sequence: Sequence, row: int) -> None:
        """Give a sequence a row."""
        self.free_rows.remove(row)
        sequence.row, sequence.status = row, Status.RUNNING
        insort(self.running, sequence, key=_priority)

    def remove(self, sequence: Sequence) -> int | None:
        """Take a sequence out, wherever it is; returns the row that it owned."""
        if sequence.status is Status.FINISHED and sequence.sampled:
            self.written += (sequence.sampled - self.written) / max(1, len(self.running))
        for queue in (self.waiting, self.running, self.swapped):
            at = bisect_left(queue, sequence.priority, key=_priority)
            if at < len(queue) and queue[at] is sequence:
                del queue[at]
        row, sequence.row = sequence.row, None
        if row is not None:
            self.free_rows.append(row)
        return row

    def issued(self, step: RunStep) -> None:
        """The step has been given to the device."""
        chunks = {c.sequence.row_(): c.count for c in step.chunks}
        self.ledger.issue(step.rows, chunks)
        for sequence in step.decodes:
            sequence.placed += 1
            sequence.sampled += 1
        for chunk in step.chunks:
            chunk.sequence.placed += chunk.count
            for sequence in chunk.samples:
                sequence.sampled += 1

    def observe_ratio(self, held: NDArray[np.int64]) -> None:
        """Update the expected ratio from what the running sequences hold: slots of each row, over layers and heads."""
        slots = int(held[[s.row_() for s in self.running]].sum()) if self.running else 0
        if slots:
            self.ratio = max(1.0, sum([s.placed for s in self.running]) * self.ledger.heads / slots)
            self.best_ratio = max(self.best_ratio, self.ratio)

    def pages_needed(self, request: Request) -> int:
        """Pages that one sample needs at the best ratio to be hoped for. More than the pool: it can never fit."""
        new = 1 if request.params.max_tokens is None else request.most_new
        prompt = len(request.prompt)
        held = self.ledger.estimate(prompt, prompt + new - 1, self.best_ratio)
        return max(held, self.ledger.estimate_prompt(prompt, self.best_ratio))

    # What to do next

    def decide(self, *, in_flight: bool) -> Action:
        """The next action. in_flight: a step is not read back yet; then only a RunStep or a SwapIn may follow it."""
        self._outlook = None
        ready = [s for s in self.running if s.ready]
        step = RunStep(decodes=ready)
        if ready and not self._more_to_do(ready) and self.ledger.surely_fits(len(ready)):
            return step
        rows = np.array(step.rows, dtype=np.int64)
        now = self.ledger.growth(rows, 1)
        free = self.ledger.available() - now
        if free < 0:
            return self._make_room(in_flight)
        if back := self._fitting(free):
            return SwapIn(rows=back)
        if self.waiting or len(ready) < len(self.running):
            step.chunks.extend(self._chunks(ready, free + now - self.ledger.growth(rows, 2)))
        if ready or step.chunks:
            return step
        if in_flight:
            return Settle()
        if self.running:
            return self._make_room(in_flight)
        return GiveUp(sequence=self.swapped[0]) if self.swapped else Idle()

    def _more_to_do(self, ready: list[Sequence]) -> bool:
        """Whether anything but decodes may come into the next step, or before it."""
        if self.free_rows and (self.swapped or self.waiting):
            return True
        return len(ready) < len(self.running) and not all(s.decoding for s in self.running)

    def forks(self, cost: int) -> int:
        """How many copies of a prefilled row, of `cost` pages each, may start at once."""
        heads = self.ledger.heads
        room = self.ledger.available() - heads * len(self.running)
        return max(0, min(len(self.free_rows), room // (cost + heads)))

    def _make_room(self, in_flight: bool) -> Action:
        if in_flight:
            return Settle()
        if len(self.running) > 1:
            return SwapOut(sequence=self.running[-1])
        return GiveUp(sequence=self.running[0])

    def _fitting(self, free: int) -> list[tuple[Sequence, int]]:
        """Those that come back from host memory, the first first, and their rows. free: beyond the next step."""
        found: list[tuple[Sequence, int]] = []
        for sequence, row in zip(self.swapped, reversed(self.free_rows), strict=False):
            assert sequence.swapped is not None
            step = self.ledger.growth_from(sequence.swapped.lengths.numpy(), 1)
            newcomers = [*(s for s, _ in found), sequence]
            if not self._leaves(free - sequence.swapped.pages, newcomers, at_least=step):
                break
            free -= sequence.swapped.pages + step
            found.append((sequence, row))
        return found

    def _leaves(self, spare: int, newcomers: list[Sequence], *, at_least: int = 0) -> bool:
        """Whether `spare` pages, beside newcomers, are what they must leave. A prompt's forks may be in the list as the
        prompt itself. Of the growth half: all of it would leave a fifth of the pool idle in the mean, and a few swaps
        cost less."""
        if not self.running and len(newcomers) == 1:
            return spare >= at_least
        heads, together = self.ledger.heads, len(self.running) + len(newcomers)
        if spare < max(at_least, heads * together):
            return False
        slots = 2 * spare * self.ledger.page_size * self.ratio
        if slots >= heads * together * max(self.written, self.ledger.page_size):
            return True  # whatever they have written
        if self._outlook is None:
            growing = self.ledger.growing([s.row_() for s in self.running]) if self.running else heads
            least = self.ledger.page_size
            self._outlook = Outlook.of(self.running, expected=self.written, least=least, growing=growing)
        each = min(self.written, max(s.request.most_new for s in newcomers))
        more = together - len(self._outlook.left)  # newcomers of this step run already
        return slots >= self._outlook.growing * self._outlook.tokens(more, each)

    def _chunks(self, ready: list[Sequence], spare: int) -> list[Chunk]:
        """spare: the pages that are left when all that is ready has run twice."""
        budget, chunks = self.max_tokens - len(ready), []
        expected, scored = 0, SCORED
        for sequence in [s for s in self.running if not s.decoding]:
            most = min(sequence.remaining, budget, scored if sequence.request.scored else budget)
            count = self.ledger.fit(sequence.row_(), most, spare) if most > 0 else 0
            expected += self._expected(sequence, count)
            if count > 0:
                chunks.append(_chunk(sequence, count))
                spare -= self.ledger.growth_of_prompt(sequence.row_(), count)
                budget -= count
                scored -= chunks[-1].scored
        promised = [s for s in self.running if not s.decoding for _ in range(_together(s, self.rows) - 1)]
        while self.waiting and budget > 0 and self.free_rows and not self.swapped:
            sequence = self.waiting[0]
            together = [sequence] * _together(sequence, self.rows)
            if self.running and len(self.free_rows) - len(promised) < len(together):
                break
            taken = self._expected(sequence, 0) + expected + self.ledger.heads * (len(promised) + len(together) - 1)
            if self.running and not self._leaves(spare - taken, promised + together):
                break
            row = self.free_rows[-1]
            most = min(sequence.remaining, budget, scored if sequence.request.scored else budget)
            count = self.ledger.fit(row, most, spare) if most > 0 else 0
            if count == 0:
                break
            self.waiting.pop(0)
            self.start(sequence, row)
            expected += self._expected(sequence, count)
            promised += together[1:]
            chunks.append(_chunk(sequence, count))
            spare -= self.ledger.growth_of_prompt(row, count)
            budget -= count
            scored -= chunks[-1].scored
        return chunks

    def _expected(self, sequence: Sequence, chunk: int) -> int:
        """Pages that the rest of a prompt will take after this chunk, at the expected ratio."""
        ledger, done = self.ledger, sequence.placed + chunk
        return ledger.estimate_prompt(sequence.total, self.ratio) - ledger.estimate_prompt(done, self.ratio)


def _chunk(sequence: Sequence, count: int) -> Chunk:
    samples = []
    if count == sequence.remaining:
        samples = [sequence, *(s for s in sequence.request.sequences if s.status is Status.PENDING)]
    return Chunk(sequence=sequence, start=sequence.placed, count=count, samples=samples)


def _together(sequence: Sequence, rows: int) -> int:
    """The rows that a prompt's samples should find free: one each, and a sixteenth of all at most."""
    return min(sequence.request.params.n, max(1, rows // 16))


def _priority(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority
