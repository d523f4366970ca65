"""What samples held and read of the cache: at their end, and as it was at any shorter length.

One unit throughout: tokens of a KV head, averaged over layers and KV heads.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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
    def total(parts: "Sequence[RequestKV]") -> "RequestKV":
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
class KVHistory:
    """What one finished sample held and read, step by step: slots summed over layers and heads.

    Entry 0 is the end of its prompt, when its first token was drawn; entry i, the decode step that drew token i + 1.
    """

    seen: int
    """Tokens in the cache at entry 0."""
    prompt_peak: int
    """The most held until then."""
    held: "array[int]"
    """Slots in use after each entry; a decode step reads so many where the policy does not choose what to read."""
    chosen: "array[int]"
    """Slots read, and pages whose bounds were, of each decode step in turn, where the policy chooses; else empty."""
    heads: int
    """Layers times KV heads, to average over."""

    @property
    def most(self) -> int:
        """Tokens that the sample has drawn."""
        return len(self.held)

    def at(self, tokens: int) -> RequestKV:
        """The cache as max_tokens=tokens would have left it. Raises ValueError where the sample has fewer, or for 0."""
        if not 1 <= tokens <= self.most:
            raise ValueError(f"{tokens} tokens of a sample of {self.most}; ask for 1 to {self.most}")
        held = np.frombuffer(self.held, dtype=np.int64)[:tokens]
        reads, bounds = held[1:], held[:0]
        if self.chosen:
            reads, bounds = np.frombuffer(self.chosen, dtype=np.int64).reshape(-1, 2)[: tokens - 1].T
        return RequestKV(
            tokens_seen=self.seen + tokens - 1,
            tokens_held=int(held[-1]) / self.heads,
            kv_reads=int(reads.sum()) / self.heads,
            bound_reads=int(bounds.sum()) / self.heads,
            peak_tokens=max(self.prompt_peak, int(held.max())) / self.heads,
        )
