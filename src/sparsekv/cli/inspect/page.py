"""The page of `inspect`: one HTML file without network. What a head holds is shaded, everywhere in the same hue.

A panel for each method: a map of the heads by layers with each head's compression ratio, what is kept by kind of token,
and the text, every token shaded by the share of heads that still hold it. Clicking a head shows what it alone holds.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

import numpy as np
from torch import Tensor

from sparsekv.cache.pages import human_bytes
from sparsekv.cli.inspect.kinds import Share, by_age, by_kind, sorted_heads
from sparsekv.modeling.tracing.trace import Trace

HUES = ("#b85c12", "#1f5f8b", "#4c7a34", "#7b3f8c")
"""Of the methods' lines."""
WIDE, TALL = 560, 220
"""Of the chart, in its own units."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A trace with the words for it."""

    title: str
    model: str
    method: str
    """The policy or the adapter."""
    cr: float | None
    """The ratio asked for; None = as trained, or as the budget says."""
    pieces: list[str]
    """The text, cut into one piece per token."""
    trace: Trace

    @property
    def kept(self) -> Tensor:
        """bool [layers, kv_heads, tokens]: held at the end, or read by the last query where a policy reads less."""
        return self.trace.held if self.trace.read is None else self.trace.read


def build_page(*methods: Inspected) -> str:
    """The HTML page: the methods side by side, of one text and model."""
    first = methods[0]
    names = " and ".join(inspected.method for inspected in methods)
    return _template("page.html").substitute(
        title=html.escape(first.title),
        subtitle=html.escape(f"{first.model} with {names}"),
        chart=_chart(methods),
        panels="".join(_panel(inspected, HUES[i % len(HUES)]) for i, inspected in enumerate(methods)),
    )


def _template(name: str) -> Template:
    return Template(files("sparsekv.cli.inspect").joinpath(name).read_text(encoding="utf-8"))


def _panel(inspected: Inspected, hue: str) -> str:
    held, trace = inspected.kept.flatten(0, 1), inspected.trace
    asked = "" if inspected.cr is None else f" (asked: {inspected.cr:g})"
    numbers = [
        (f"{trace.stats.compression_ratio:.2f}", f"compression ratio held{asked}"),
        (f"{trace.stats.tokens_seen:,}", "tokens read"),
        (f"{trace.stats.tokens_held:,.0f}", "tokens held, mean of all heads"),
        (human_bytes(trace.stats.bytes), "of keys and values held"),
    ]
    if trace.window:
        numbers.append((f"{trace.window}", "newest tokens always kept"))
    counts = held.sum(0)
    settled = counts[: -trace.window] if 0 < trace.window < len(counts) else counts
    low, high = int(settled.min()), int(settled.float().quantile(0.99))  # a few first tokens are held by nearly all
    tokens = held.shape[-1]
    ratios = [[tokens / max(n, 1) for n in layer] for layer in inspected.kept.sum(-1).tolist()]
    return _template("panel.html").substitute(
        method=html.escape(inspected.method),
        hue=hue,
        numbers="".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in numbers),
        verb="still hold it" if trace.read is None else "read it last",
        heads=len(held),
        low=low,
        high=high,
        map=_map(dict(zip(trace.layers, ratios, strict=True))),
        sorted=_sorted(trace.layers, sorted_heads(inspected.kept)),
        kinds=_shares("kind of token", by_kind(inspected.kept, inspected.pieces, window=trace.window), trace.layers),
        ages=_shares("tokens ago", by_age(inspected.kept), trace.layers),
        text=_text(inspected.pieces, counts.tolist(), low, high),
        bits=json.dumps([_bits(head) for head in held]),
    )


def _chart(methods: Sequence[Inspected]) -> str:
    """The measured ratio against length, a line for each method."""
    longest = max(inspected.trace.lengths[-1] for inspected in methods)
    top = max(max(inspected.trace.ratios) for inspected in methods) * 1.05
    marks = [top * i / 4 for i in range(5)]
    parts = [
        f'<line x1="40" x2="{WIDE}" y1="{_y(mark, top):.1f}" y2="{_y(mark, top):.1f}"/>'
        f'<text x="34" y="{_y(mark, top) + 4:.1f}" text-anchor="end">{mark:.1f}</text>'
        for mark in marks
    ]
    parts.append(f'<text x="{WIDE}" y="{TALL - 4}" text-anchor="end">{longest:,} tokens read</text>')
    for i, inspected in enumerate(methods):
        trace = inspected.trace
        points = " ".join(
            f"{40 + (WIDE - 40) * length / longest:.1f},{_y(ratio, top):.1f}"
            for length, ratio in zip(trace.lengths, trace.ratios, strict=True)
        )
        parts.append(f'<polyline points="{points}" style="stroke:{HUES[i % len(HUES)]}"/>')
    return f'<svg viewBox="0 0 {WIDE + 8} {TALL}" role="img" aria-label="ratio against length">{"".join(parts)}</svg>'


def _y(ratio: float, top: float) -> float:
    return TALL - 24 - (TALL - 40) * ratio / top


def _map(ratios: dict[int, list[float]]) -> str:
    """A table: one row per KV head, one column per layer."""
    kv_heads = len(next(iter(ratios.values())))
    rows = []
    for head in range(kv_heads):
        cells = []
        for column, (layer, row) in enumerate(ratios.items()):
            shown = f"{row[head]:.1f}" if row[head] < 9.95 else f"{row[head]:.0f}"
            cells.append(
                f'<td><button style="--s:{1 / max(row[head], 1):.3f}" data-head="{column * kv_heads + head}" '
                f'aria-label="layer {layer}, head {head}: ratio {row[head]:.2f}">{shown}</button></td>'
            )
        rows.append((f"head {head}", cells))
    return _table("layer", list(ratios), rows)


def _sorted(layers: list[int], shares: np.ndarray) -> str:
    rows = [(f"no. {rank + 1}", [_cell(share) for share in column]) for rank, column in enumerate(shares.T)]
    return _table("layer", layers, rows)


def _shares(name: str, shares: list[Share], layers: list[int]) -> str:
    rows = [
        (
            share.name,
            [f'<td class="n">{share.tokens:,}</td>', _cell(share.held), *(_cell(value) for value in share.by_layer)],
        )
        for share in shares
    ]
    return _table(html.escape(name), ["tokens", "held", *layers], rows)


def _cell(share: float) -> str:
    return f'<td><i style="--s:{share:.3f}">{100 * share:.0f}</i></td>'


def _table(corner: str, columns: Sequence[object], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows)
    return f'<table><thead><tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _text(pieces: list[str], counts: list[int], low: int, high: int) -> str:
    """One span per token; its data-n is how many heads hold it, shaded between low and high."""
    spread = max(high - low, 1)
    return "".join(
        f'<span data-n="{n}" style="--s:{min((n - low) / spread, 1):.3f}">{html.escape(piece) or "&#8203;"}</span>'
        for piece, n in zip(pieces, counts, strict=True)
    )


def _bits(head: Tensor) -> str:
    """bool [tokens] as base64, lowest bit first."""
    return base64.b64encode(np.packbits(head.numpy(), bitorder="little").tobytes()).decode()
