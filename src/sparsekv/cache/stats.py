"""What a cache holds and what was read from it, counted by the allocator, never by formula."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KVStats:
    """Statistics of a cache, over all its rows."""

    tokens_seen: int
    """Tokens that went in, summed over rows."""
    tokens_held: float
    """Slots in use, averaged over layers and heads, summed over rows."""
    compression_ratio: float
    """tokens_seen / tokens_held, the window counted; 1 for an empty cache."""
    kv_reads: int
    """Tokens attended to, summed over decode steps, rows, layers and KV heads."""
    peak_tokens: float
    """The largest tokens_held after any forward."""
    pages: int
    """Pages in use, shared ones once."""
    bytes: int
    """Bytes of those pages."""
    index_bytes: int
    """Bytes of page tables, rings and lengths."""
    held: list[list[int]]
    """[layers][kv_heads]: slots in use, summed over rows."""

    @property
    def ratio_per_head(self) -> list[list[float]]:
        """[layers][kv_heads]: tokens_seen / slots in use."""
        return [[self.tokens_seen / max(n, 1) for n in layer] for layer in self.held]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
