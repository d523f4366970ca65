"""The page of `inspect`: one HTML file without network. What a head holds is shaded, everywhere in the same hue.

Above, a map of the heads by layers with each head's compression ratio; below, the text, every token shaded by the share
of heads that still hold it. Clicking a head shows what that head alone holds.
"""

import base64
import html
import json
from dataclasses import dataclass
from importlib.resources import files
from string import Template

import numpy as np
from torch import Tensor

from sparsekv.cache.pages import human_bytes
from sparsekv.modeling.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A trace with the words for it."""

    title: str
    model: str
    adapter: str
    cr: float | None
    """The ratio asked for; None = as trained."""
    pieces: list[str]
    """The text, cut into one piece per token."""
    layers: list[int]
    """The governed layers, those that the trace has."""
    trace: Trace

    @property
    def held(self) -> Tensor:
        """bool [layers * kv_heads, tokens]."""
        return self.trace.held.flatten(0, 1)


def build_page(inspected: Inspected) -> str:
    """The HTML page."""
    held, trace = inspected.held, inspected.trace
    asked = "as trained" if inspected.cr is None else f"asked: {inspected.cr:g}"
    numbers = [
        (f"{trace.stats.compression_ratio:.2f}", f"compression ratio held ({asked})"),
        (f"{trace.stats.tokens_seen:,}", "tokens read"),
        (f"{trace.stats.tokens_held:,.0f}", "tokens held, mean of all heads"),
        (human_bytes(trace.stats.bytes), "of keys and values held"),
        (f"{trace.window}", "newest tokens always kept"),
    ]
    counts = held.sum(0)
    settled = counts[: -trace.window] if len(counts) > trace.window else counts
    low, high = int(settled.min()), int(settled.float().quantile(0.99))  # a few first tokens are held by nearly all
    template = Template(files("sparsekv.cli").joinpath("inspect_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(inspected.title),
        subtitle=html.escape(f"{inspected.model} with {inspected.adapter}"),
        numbers="".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in numbers),
        heads=len(held),
        low=low,
        high=high,
        map=_map({layer: trace.stats.ratio_per_head[layer] for layer in inspected.layers}),
        text=_text(inspected.pieces, counts.tolist(), low, high),
        bits=json.dumps([_bits(head) for head in held]),
    )


def _map(ratios: dict[int, list[float]]) -> str:
    """A table: one row per KV head, one column per layer."""
    columns = "".join(f'<th scope="col">{layer}</th>' for layer in ratios)
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
        rows.append(f'<tr><th scope="row">head {head}</th>{"".join(cells)}</tr>')
    return f'<table><thead><tr><th scope="col">layer</th>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


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
