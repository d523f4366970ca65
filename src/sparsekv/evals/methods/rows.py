"""A row of results: one task under one setting, with what the cache held and read while it was scored."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsekv.cache.stats import KVStats
from sparsekv.engine.kv import RequestKV
from sparsekv.evals.methods.intervals import Estimate
from sparsekv.evals.methods.setting import Setting


@dataclass(kw_only=True)
class Usage:
    """What sequences held and read, summed over them."""

    counts_reads: bool = True
    """False where a prefill was measured, which has no decode steps."""
    sequences: int = 0
    output: int = 0
    """Tokens scored or generated."""
    seen: int = 0
    held: float = 0.0
    peak: float = 0.0
    reads: float = 0.0
    bounds: float = 0.0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, kv: KVStats | RequestKV, *, sequences: int, output: int, size: int) -> None:
        """Take in what some sequences did. size: bytes of their pages."""
        self.sequences += sequences
        self.output += output
        self.seen += kv.tokens_seen
        self.held += kv.tokens_held
        self.peak += kv.peak_tokens
        self.reads += kv.kv_reads
        self.bounds += kv.bound_reads
        self.bytes += size

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within, the clock runs."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. Counts of tokens and bytes are means of one sequence, averaged over layers and KV heads."""

    task: str
    length: int | None
    """Tokens of each sequence, output included; None where they differ."""
    text: str | None = None
    """Which running text."""
    policy: str
    adapter: str | None
    cr: float | None
    """As asked for."""
    budget: int | None
    """As asked for, or made of cr and the length."""
    seed: int
    ratio: float
    """Measured at the end: tokens seen / tokens held."""
    sequences: int
    output_tokens: float
    tokens_seen: float
    tokens_held: float
    peak_tokens: float
    bytes: float
    kv_reads: float | None
    """Tokens attended to by decode steps; null where the score was read off a prefill."""
    bound_reads: float | None
    """Pages whose bounds were read to choose them: two vectors each."""
    seconds: float
    """Of the model's work, all sequences."""
    scores: dict[str, Estimate]
    by_depth: dict[str, Estimate | None] = field(default_factory=dict)
    """The share of right answers about facts told in each quarter of the text."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def make_row(setting: Setting, usage: Usage, *, budget: int | None, seed: int, **rest: Any) -> Row:
    """rest: Row's task, length, text, scores and by_depth."""
    n = usage.sequences
    return Row(
        policy=setting.policy,
        adapter=setting.adapter,
        cr=setting.cr,
        budget=budget,
        seed=seed,
        ratio=usage.seen / usage.held if usage.held else 1.0,
        sequences=n,
        output_tokens=usage.output / n,
        tokens_seen=usage.seen / n,
        tokens_held=usage.held / n,
        peak_tokens=usage.peak / n,
        bytes=usage.bytes / n,
        kv_reads=usage.reads / n if usage.counts_reads else None,
        bound_reads=usage.bounds / n if usage.counts_reads else None,
        seconds=round(usage.seconds, 3),
        **rest,
    )


def describe(row: Row) -> str:
    """One line for people."""
    where = " ".join(str(x) for x in (row.text, row.length and f"{row.length} tokens") if x)
    asked = row.policy + (f" at {row.cr:g}" if row.cr else "") + (f" of {row.budget}" if row.budget else "")
    scores = "  ".join(f"{name} {estimate}" for name, estimate in row.scores.items())
    reads = "" if row.kv_reads is None else f"  reads {row.kv_reads:.0f}"
    return (
        f"{row.task} {where}  {asked}: ratio {row.ratio:.2f}  peak {row.peak_tokens:.0f}{reads}  {scores}  "
        f"[{row.seconds:.1f} s]"
    )
