"""What a request returns, with vLLM's field names, and what it held and read of the cache."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability at one position."""

    logprob: float
    rank: int
    """1 = the most probable token."""
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestKV:
    """The cache of one sample, or the sum over a request's samples."""

    tokens_seen: int
    """Tokens that went in."""
    tokens_held: float
    """Slots in use at the end, averaged over layers and KV heads."""
    kv_reads: float
    """Tokens attended to, averaged over layers and KV heads, summed over decode steps."""
    bound_reads: float
    """Pages whose bounds were read to choose what to read, in the same unit: two vectors a page."""
    peak_tokens: float
    """The largest tokens_held of each sample, summed."""

    @property
    def compression_ratio(self) -> float:
        """tokens_seen / tokens_held, the window counted; 1 for an empty cache."""
        return self.tokens_seen / self.tokens_held if self.tokens_held else 1.0

    @staticmethod
    def total(parts: "list[RequestKV]") -> "RequestKV":
        return RequestKV(
            tokens_seen=sum(p.tokens_seen for p in parts),
            tokens_held=sum(p.tokens_held for p in parts),
            kv_reads=sum(p.kv_reads for p in parts),
            bound_reads=sum(p.bound_reads for p in parts),
            peak_tokens=sum(p.peak_tokens for p in parts),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("tokens_seen", "tokens_held", "compression_ratio", "kv_reads", "bound_reads", "peak_tokens")
        return {name: getattr(self, name) for name in names}


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


@dataclass(kw_only=True)
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per position, the sampled token's and the most probable tokens' log-probabilities."""
    finish_reason: str | None = None
    """None while running; "stop" (end of text, stop string or token), "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop string or token id that ended it; "kv_memory" where the pool could not hold one token more of it,
    "stop_when" where its caller had seen enough of the other samples."""
    kv: RequestKV | None = None
    session: Session | None = None
    """With keep=True: continue from here."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestMetrics:
    """When a request came, started and spoke: seconds since the epoch, None for what has not happened."""

    arrival_time: float = field(default_factory=time.time)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

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

    @property
    def kv(self) -> RequestKV:
        """The sum over the samples."""
        return RequestKV.total([output.kv for output in self.outputs if output.kv is not None])

    @property
    def session(self) -> Session | None:
        """The first sample's."""
        return self.outputs[0].session
