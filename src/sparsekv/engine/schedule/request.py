"""A request and its samples: the state that the scheduler decides on and the runner reads.

A sample's tokens are counted twice: `placed` and `sampled` count what the device was told to do, `tokens` holds what
the host has read back, at most one step behind.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from sparsekv.engine.kv import KVHistory, RequestKV
from sparsekv.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, Session
from sparsekv.engine.params import SamplingParams

if TYPE_CHECKING:
    from sparsekv.cache.swap import SwappedRow
    from sparsekv.engine.detokenizer import Detokenizer


StopWhen = Callable[[list[CompletionOutput]], bool]
"""From a request's finished samples, whether the others may stop."""


class Status(Enum):
    """Where a sample is."""

    PENDING = "waits for the first sample of its request to be prefilled"
    WAITING = "has nothing in the cache"
    RUNNING = "owns a row"
    SWAPPED = "is in host memory"
    FINISHED = "is finished"


@dataclass(kw_only=True)
class Counters:
    """What a sample has placed, in tokens, and held and read, in slots (bounds: pages) summed over layers and heads: of
    the steps that have been read back, up to the one that finished it.

    A decode step only appends to `history`, and to `chosen`; they are summed up when someone asks.
    """

    prompt_seen: int = 0
    prompt_held: int = 0
    prompt_peak: int = 0
    history: "array[int]" = field(default_factory=lambda: array("q"))
    """What was held when the prompt was over, then after each decode step, which read all of it."""
    chosen: "array[int]" = field(default_factory=lambda: array("q"))
    """What each decode step read, and its bounds, where the policy chooses."""
    _summed: tuple[int, int, int, int] = (1, 0, 0, 0)
    """How many entries of `history` the sums know; reads, bounds and peak of those."""

    def read_prompt(self, tokens: int, *, held: int, peak: int = 0, over: bool) -> None:
        """A chunk left `held`; peak: held for a while in between; over: it was the last."""
        self.prompt_seen += tokens
        self.prompt_held = held
        self.prompt_peak = max(self.prompt_peak, held, peak)
        if over:
            self.history.append(held)

    @property
    def seen(self) -> int:
        return self.prompt_seen + max(len(self.history) - 1, 0)

    @property
    def held(self) -> int:
        return self.history[-1] if self.history else self.prompt_held

    @property
    def reads(self) -> int:
        return self._sums()[1]

    @property
    def bounds(self) -> int:
        return self._sums()[2]

    @property
    def peak(self) -> int:
        return max(self.prompt_peak, self._sums()[3])

    def _sums(self) -> tuple[int, int, int, int]:
        known, reads, bounds, peak = self._summed
        new = self.history[known:]
        if new:
            chosen = self.chosen[2 * (known - 1) :]
            reads += sum(chosen[::2] if self.chosen else new)
            self._summed = len(self.history), reads, bounds + sum(chosen[1::2]), max(peak, max(new))
        return self._summed

    def copy(self) -> "Counters":
        return replace(self, history=self.history[:], chosen=self.chosen[:])

    def recorded(self, heads: int) -> KVHistory | None:
        """The history once nothing is added to it any more."""
        if not self.history:
            return None
        return KVHistory(
            seen=self.prompt_seen, prompt_peak=self.prompt_peak, held=self.history, chosen=self.chosen, heads=heads
        )


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One sample of a request."""

    request: "Request"
    index: int
    tokens: list[int]
    """Prompt and output, as far as the host knows them."""
    status: Status
    placed: int = 0
    """Tokens in the cache, those of the step in flight included."""
    sampled: int = 0
    """Tokens sampled, those of the step in flight included."""
    row: int | None = None
    swapped: "SwappedRow | None" = None
    """Its cache, while it is in host memory."""
    detokenizer: "Detokenizer | None" = None
    counters: Counters = field(default_factory=Counters)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: str | None = None
    """The final text, where a stop string cut it."""
    session: Session | None = None

    @property
    def priority(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.request.arrival, self.index

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def total(self) -> int:
        """Tokens of the sample, the one being sampled included."""
        return len(self.request.prompt) + self.sampled

    @property
    def remaining(self) -> int:
        """Tokens to place before the next can be sampled."""
        return self.total - self.placed

    @property
    def decoding(self) -> bool:
        """Whether the last token sampled is all that is left to place."""
        return self.sampled > 0

    @property
    def ready(self) -> bool:
        """Whether it decodes, and may sample more."""
        return 0 < self.sampled < self.request.most_new

    def finish(self, reason: str, *, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason, self.status = reason, stop_reason, Status.FINISHED

    def row_(self) -> int:
        assert self.row is not None
        return self.row

    def read_text(self) -> str:
        """What can no longer be taken back: a running sample holds back what may be the start of a stop string. Cheap
        for a step, and as cheap for thousands of them at once."""
        if self.text is not None or self.detokenizer is None:
            return self.text or ""
        finished = self.status is Status.FINISHED
        silent = 1 if self.finish_reason == "stop" else 0  # the token that ended it is no text
        self.detokenizer.advance(end=len(self.tokens) - silent, final=finished)
        text = self.detokenizer.text
        longest = self.request.params.longest_stop
        return text if finished or longest == 1 else text[: max(len(text) - longest + 1, 0)]


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    id: str
    arrival: int
    prompt: list[int]
    """Token ids; those of a continued session first."""
    params: SamplingParams
    seed: int
    most_new: int
    """Tokens that each sample may have at most: max_tokens, or what the context leaves."""
    text: str | None = None
    keep: bool = False
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a sample."""
    heads: int = 1
    """Layers times KV heads, to average over."""
    stop_when: StopWhen | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    sequences: list[Sequence] = field(default_factory=list)
    plain: bool = field(init=False)
    """Whether a token is nothing but its id: no text is watched and no log-probabilities are wanted."""
    longest: int = field(init=False)
    """Tokens that each sample may have at most, the prompt's included."""

    def __post_init__(self) -> None:
        self.plain = not self.params.stops and self.params.logprobs is None
        self.longest = len(self.prompt) + self.most_new

    @property
    def finished(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    @property
    def scored(self) -> bool:
        """Whether the prompt's tokens get log-probabilities."""
        return self.params.prompt_logprobs is not None

    def completed(self) -> list[CompletionOutput]:
        """The finished samples."""
        return [self._completion(each) for each in self.sequences if each.status is Status.FINISHED]

    def output(self) -> RequestOutput:
        """A snapshot of the samples."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.text,
            prompt_token_ids=self.prompt,
            outputs=[self._completion(sequence) for sequence in self.sequences],
            finished=self.finished,
            metrics=self.metrics.copy(),
            prompt_logprobs=list(self.prompt_logprobs) if self.scored else None,
        )

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        counters, wanted = sequence.counters, self.params.logprobs is not None
        return CompletionOutput(
            index=sequence.index,
            text=sequence.read_text(),
            known=sequence.tokens,
            span=(len(self.prompt), len(sequence.tokens)),
            cumulative_logprob=sequence.cumulative_logprob if wanted else None,
            logprobs=list(sequence.logprobs) if wanted else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            kv=RequestKV(
                tokens_seen=counters.seen,
                tokens_held=counters.held / self.heads,
                kv_reads=counters.reads / self.heads,
                bound_reads=counters.bounds / self.heads,
                peak_tokens=counters.peak / self.heads,
            ),
            kv_history=counters.recorded(self.heads) if sequence.status is Status.FINISHED else None,
            session=sequence.session,
        )
