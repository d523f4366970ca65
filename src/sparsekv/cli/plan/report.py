"""What `sparsekv plan` shows: two tables and a line on the terminal, and a picture of latency against context."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparsekv.cost import (
    MAX_CONTEXT,
    Hardware,
    Limits,
    Measured,
    ModelShape,
    Plan,
    largest_context,
    step_seconds,
)
from sparsekv.studies.pictures import SHADES, SOFT, name_end, plain

_SHORTEST = 1024


def show(
    shape: ModelShape,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    plans: Sequence[Plan],
    chains: Sequence[dict[str, float]],
    measured: Sequence[Measured],
) -> None:
    """Print the plan, one column a ratio."""
    console = Console(highlight=False)
    console.print(f"{shape.name} on {hardware.name}: one step of {batch:,} x {context:,} tokens\n")
    if context > shape.context:
        console.print(f"The model was made for {shape.context:,} tokens; this is beyond them.\n")
    steps = _table("", plans)
    for name, *cells in step_rows(plans):
        steps.add_row(name, *cells)
    console.print(steps)
    console.print("\nThe most parallel chains that fit, by the length that all have reached:\n")
    fitting = _table("tokens", plans)
    for length in dict.fromkeys(row["context"] for row in chains):
        fitting.add_row(f"{length:,}", *(f"{row['chains']:,}" for row in chains if row["context"] == length))
    console.print(fitting)
    console.print(f"\n{measured_line(measured)}", soft_wrap=True)


def step_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """Name and a cell for each ratio."""
    rows = [
        ["FLOPs", *(f"{plan.flops:.3g}" for plan in plans)],
        ["bytes read", *(f"{plan.bytes_read:.3g}" for plan in plans)],
        ["keys and values", *(_gib(plan.kv_bytes) for plan in plans)],
        ["their share of what is read", *(f"{plan.kv_share:.0%}" for plan in plans)],
        ["memory with weights", *(_gib(plan.memory) for plan in plans)],
        ["fits", *("yes" if plan.fits else "no" for plan in plans)],
        ["latency, ms", *(f"{1e3 * plan.seconds:.2f}" for plan in plans)],
        ["waits for", *(plan.bound for plan in plans)],
        ["tokens/s", *(f"{plan.tokens_per_second:,.0f}" for plan in plans)],
        ["largest batch at this context", *(f"{plan.largest_batch:,}" for plan in plans)],
        ["largest context at this batch", *(f"{plan.largest_context:,}" for plan in plans)],
        ["joules a token, at full power", *(f"{plan.joules_per_token:.3g}" for plan in plans)],
    ]
    grams, prices = ([getattr(plan, f"{name}_per_million_tokens") for plan in plans] for name in ("grams", "price"))
    if grams[0] is not None:
        rows.append(["grams CO2 a million tokens", *(f"{value:,.1f}" for value in grams)])
    if prices[0] is not None:
        rows.append(["price of a million tokens", *(f"{value:,.3f}" for value in prices)])
    return rows


def measured_line(measured: Sequence[Measured]) -> str:
    """How far measured steps are from the prediction."""
    if not measured:
        return "No step of this model on this device is in benchmarks/results: nothing says how far off this is."
    over = [step.over for step in measured]
    commits = ", ".join(dict.fromkeys(step.commit or "unknown" for step in measured))
    return (
        f"Measured steps of this model on this device took {min(over):.2f} to {max(over):.2f} times the latency "
        f"predicted ({len(over)} steps, commit {commits})."
    )


def draw(
    shape: ModelShape, hardware: Hardware, *, batch: int, ratios: Sequence[float], limits: Limits, file: Path
) -> None:
    """Latency of a step against the context to 1M tokens, one line a ratio, as PNG; dotted beyond the limits."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=160)
    for i, ratio in enumerate(ratios):
        colour = SHADES[i % len(SHADES)]
        longest = largest_context(shape, hardware, batch=batch, ratio=ratio, limits=limits)
        marks = sorted({round(_SHORTEST * 2 ** (j / 4)) for j in range(41)} | {max(longest, _SHORTEST)})
        ms = [1e3 * max(step_seconds(shape, hardware, batch=batch, context=c, ratio=ratio)) for c in marks]
        inside = [(c, y) for c, y in zip(marks, ms, strict=True) if c <= longest]
        axes.plot(marks, ms, color=colour, linewidth=1.2, linestyle=":")
        if inside:
            axes.plot(*zip(*inside, strict=True), color=colour, linewidth=2)
        name_end(axes, (marks[-1], ms[-1]), f"{_name(ratio)}, {ms[-1]:,.0f} ms", colour)
    axes.set(xscale="log", yscale="log", xlim=(_SHORTEST, MAX_CONTEXT))
    axes.set(xlabel="tokens of context", ylabel="latency of a step, ms")
    axes.set_title(
        f"{shape.name}, batch {batch:,}, {hardware.name}; dotted: beyond memory or latency", color=SOFT, fontsize=9
    )
    ticks = [_SHORTEST << j for j in range(0, 11, 2)]
    axes.set_xticks(ticks, [f"{tick >> 10}K" if tick < MAX_CONTEXT else "1M" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain(axes)
    figure.subplots_adjust(left=0.1, right=0.8, top=0.92, bottom=0.13)
    figure.savefig(file)
    plt.close(figure)


def _table(corner: str, plans: Sequence[Plan]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(corner, no_wrap=True)
    for plan in plans:
        table.add_column(_name(plan.ratio), justify="right", no_wrap=True)
    return table


def _name(ratio: float) -> str:
    return "dense" if ratio == 1 else f"ratio {ratio:g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
