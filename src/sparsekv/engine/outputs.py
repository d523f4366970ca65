"""What a request returns, with vLLM's field names, and what it held and read of the cache."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparsekv.engine.kv import KVHistory, RequestKV


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability at one position."""

    logprob: float
    rank: int
    """1 = the most probable token."""
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A finished sample that can be continued exactly: pass it to generate(..., session=...), as often as you like.

    It keeps the compressed cache in host memory until it is garbage collected.
    """

    tokens: list[int]
    """Prompt and output so far."""
    placed: int
    """How many of them are in the cache."""
    state: Any = field(repr=False)
    """cache.swap.SwappedRow."""
    owner: int = field(repr=False)
    """Which engine it belongs to."""


@dataclass(kw_only=True, eq=False, repr=False)
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    known: list[int]
    """Prompt and output; of a running sample it grows, and `span` is what this snapshot is about."""
    span: tuple[int, int]
    """Where in it the output begins and ends."""
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per position, the sampled token's and the most probable tokens' log-probabilities."""
    finish_reason: str | None = None
    """None while running; "stop" (end of text, stop string or token), "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop string or token id that ended it; "kv_memory" where the pool could not hold one token more of it,
    "stop_when" where its caller had seen enough of the other samples."""
    kv: RequestKV | None = None
    kv_history: KVHistory | None = None
    """kv at every shorter length; None while running, and of a sample that drew nothing."""
    session: Session | None = None
    """With keep=True: continue from here."""

    @cached_property
    def token_ids(self) -> list[int]:
        """The output, copied when it is first asked for: a stream makes many snapshots."""
        return self.known[slice(*self.span)]

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        names = ("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason", "kv")
        return f"CompletionOutput({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


@dataclass(kw_only=True)
class RequestMetrics:
    """When a request came, started and spoke: seconds since the epoch, None for what has not happened."""

    arrival_time: float = field(default_factory=time.time)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    def copy(self) -> "RequestMetrics":
        return RequestMetrics(
            arrival_time=self.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            last_token_time=self.last_token_time,
            finished_time=self.finished_time,
        )

    def spoke(self, now: float) -> None:
        """A token has come."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from the arrival to the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(kw_only=True)
class RequestOutput:
    """One request, with all its samples."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """As CompletionOutput.logprobs, of the prompt's tokens as far as they are read; None for the first."""

    @property
    def kv(self) -> RequestKV:
        """The sum over the samples."""
        return RequestKV.total([output.kv for output in self.outputs if output.kv is not None])

    @property
    def session(self) -> Session | None:
        """The first sample's."""
        return self.outputs[0].session
