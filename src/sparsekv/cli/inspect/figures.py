"""The two figures of arXiv 2506.05345 about what is kept, as PNG: the measured ratio against length, and the share that
each head keeps, the heads of a layer sorted; for one method or several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekv.cli.inspect.kinds import sorted_heads
from sparsekv.studies.pictures import COLOURS, GRID, INK, SOFT

if TYPE_CHECKING:
    from sparsekv.cli.inspect.page import Inspected


def draw_figures(all_inspected: Sequence["Inspected"], file: Path) -> None:
    """Write the picture."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure  # no pyplot: it would pick a window system

    count = len(all_inspected)
    figure = Figure(figsize=(5.4 + 4.4 * count, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 1 + count, squeeze=False, width_ratios=[1.2, *[1] * count])[0]
    for colour, inspected in zip(COLOURS * count, all_inspected, strict=False):
        trace = inspected.trace
        axes[0].plot(trace.lengths, trace.ratios, "o-", color=colour, markersize=4, label=inspected.method)
    axes[0].set(xlabel="tokens read", ylabel="compression ratio held", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].grid(axis="y", color=GRID)
    axes[0].set_title("Measured ratio against length", color=INK, fontsize=10, loc="left")
    range_of_shares = Normalize(0, 1)
    shades = LinearSegmentedColormap.from_list("held", ["#ffffff", COLOURS[0]])
    for panel, inspected in zip(axes[1:], all_inspected, strict=True):
        shares = sorted_heads(inspected.kept)
        panel.imshow(shares, cmap=shades, norm=range_of_shares, aspect="auto", interpolation="nearest")
        panel.set_title(f"Share kept: {inspected.method}", color=INK, fontsize=10, loc="left")
        panel.set(xlabel="KV heads of the layer, sorted", ylabel="layer", xticks=range(shares.shape[1]))
    figure.colorbar(ScalarMappable(range_of_shares, shades), ax=list(axes[1:]), label="share of the text")
    for panel in axes:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0, colors=SOFT)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
