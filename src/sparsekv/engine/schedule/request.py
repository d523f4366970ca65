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
    the steps that have been read back, up to the one that finished it."""

    seen: int = 0
    reads: int = 0
    bounds: int = 0
    held: int = 0
    peak: int = 0
    started: tuple[int, int] = (0, 0)
    """seen and peak when the prompt was over."""
    history: "array[int]" = field(default_factory=lambda: array("q"))
    """`held` when the prompt was over, then after each decode step."""
    chosen: "array[int]" = field(default_factory=lambda: array("q"))
    """What each decode step read, and its bounds, where that is not `held`."""

    def read_prompt(self, tokens: int, *, held: int, peak: int = 0, over: bool) -> None:
        """A chunk left `held`; peak: held for a while in between; over: it was the last."""
        self.seen += tokens
        self.held = held
        self.peak = max(self.peak, held, peak)
        if over:
            self.started = self.seen, self.peak
            self.history.append(held)

    def decode(self, held: int) -> None:
        """A step placed a token, left `held` and read all of it."""
        self.seen += 1
        self.held = held
        self.reads += held
        if held > self.peak:
            self.peak = held
        self.history.append(held)

    def choose(self, read: int, bounds: int) -> None:
        """The step just counted read this instead."""
        self.reads += read - self.held
        self.bounds += bounds
        self.chosen.extend((read, bounds))

    def copy(self) -> "Counters":
        return replace(self, history=self.history[:], chosen=self.chosen[:])

    def recorded(self, heads: int) -> KVHistory | None:
        """The history once nothing is added to it any more."""
        if not self.history:
            return None
        seen, peak = self.started
        return KVHistory(seen=seen, prompt_peak=peak, held=self.history, chosen=self.chosen, heads=heads)


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
