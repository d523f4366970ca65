"""What a cache holds and what was read from it, counted by the allocator, never by formula.

One unit throughout: tokens of a KV head, averaged over layers and KV heads, summed over rows.
"""

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
    kv_reads: float
    """Tokens attended to, averaged over layers and heads, summed over decode steps and rows."""
    bound_reads: float
    """Pages whose bounds were read to choose what to read (Quest), in the same unit: two vectors a page."""
    peak_tokens: float
    """The largest tokens_held during any forward, a prompt before it is pruned included."""
    pages: int
    """Pages in use, shared ones once."""
    bytes: int
    """Bytes of those pages, what policies remember of them included."""
    index_bytes: int
    """Bytes of page tables, rings, lengths and what policies remember of rows."""
    held: list[list[int]]
    """[layers][kv_heads]: slots in use, summed over rows."""
    reads: list[list[int]]
    """[layers][kv_heads]: tokens attended to, summed over decode steps and rows."""

    @property
    def ratio_per_head(self) -> list[list[float]]:
        """[layers][kv_heads]: tokens_seen / slots in use."""
        return [[self.tokens_seen / max(n, 1) for n in layer] for layer in self.held]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
