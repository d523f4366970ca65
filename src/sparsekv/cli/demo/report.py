"""What the demo shows: a table on the terminal, a picture of the cache growing, and the README's block, all from the
results of one run."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsekv.cache.pages import human_bytes
from sparsekv.markdown import replaced
from sparsekv.studies.pictures import GRID, SHADES, SOFT, name_end, plain

BLOCK = "demo"
_COLUMNS = ("method", "held", "KV held", "KV reads", "perplexity", "tokens/s", "answer", "")
_LEFT = ("method", "answer", "")
_NAMES = {"dms": "DMS", "streaming": "StreamingLLM"}
"""As papers write them."""


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table's cells, dense first."""
    dense = results["runs"][0]
    return [
        [
            _name(run),
            f"{run['ratio_held']:.2f}x",
            human_bytes(run["kv_bytes"]),
            f"{run['kv_reads'] / 1e3:.1f} K",
            f"{run['perplexity']:.2f}{_change(run['perplexity'], dense['perplexity'])}",
            f"{run['tokens_per_second']:.1f}",
            _shortened(run["answer"]),
            "right" if run["right"] else "wrong",
        ]
        for run in results["runs"]
    ]


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    shown = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        shown.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows(results):
        shown.add_row(*row[:-1], Text(row[-1], style="green" if row[-1] == "right" else "red"))
    return shown


def draw(results: dict[str, Any], file: Path) -> None:
    """Cache size against tokens, as PNG: a line for dense and for each ratio of DMS."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=160)
    runs = [run for run in results["runs"] if run["policy"] in ("dense", "dms")]
    for run, colour in zip(runs, SHADES, strict=False):
        tokens, sizes = zip((0, 0), *run["growth"], strict=True)
        mebibytes = [size / 2**20 for size in sizes]
        axes.plot(tokens, mebibytes, color=colour, linewidth=2)
        name_end(axes, (tokens[-1], mebibytes[-1]), f"{_name(run)}, {mebibytes[-1]:.0f} MiB", colour)
    last = results["runs"][0]["growth"][-1][0]
    decoded = last - results["task"]["generate"] + 1
    axes.axvspan(decoded, last, color=GRID, alpha=0.5, linewidth=0)
    axes.annotate("generated", (decoded, 1), xycoords=("data", "axes fraction"), xytext=(-4, -14),
                  textcoords="offset points", ha="right", color=SOFT, fontsize=9)  # fmt: skip
    axes.set(xlim=(0, last), ylim=(0, None), xlabel="tokens read and generated", ylabel="KV cache in memory, MiB")
    plain(axes)
    figure.subplots_adjust(left=0.08, right=0.8, top=0.96, bottom=0.13)
    figure.savefig(file)
    plt.close(figure)


def readme_block(results: dict[str, Any], picture: str) -> str:
    """Markdown between the markers: what was done, the table, the picture."""
    task, environment = results["task"], results["environment"]
    lines = [
        f"`make demo` on {environment['threads']} CPU threads: {results['model']} reads {task['context']:,} tokens of "
        f"an encyclopedia with one fact hidden in them, predicts the next {task['continuation']:,}, is asked for the "
        f"fact, and goes on for {task['generate']} tokens. All numbers come out of that one run.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "|".join("---" if name in _LEFT else "--:" for name in _COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(results)),
        "",
        f"![KV cache in memory against tokens read and generated]({picture})",
    ]
    return "\n".join(lines)


def rewrite_readme(readme: Path, block: str) -> None:
    """Replace the README's block. Raises ValueError where a marker is missing."""
    readme.write_text(replaced(readme, block, name=BLOCK), encoding="utf-8")


def _name(run: dict[str, Any]) -> str:
    """ "dense", "DMS 4x" """
    name = _NAMES.get(run["policy"], run["policy"])
    return name if name == "dense" else f"{name} {run['ratio_asked']:g}x"


def _shortened(answer: str, length: int = 12) -> str:
    return answer if len(answer) <= length else answer[: length - 1] + "…"


def _change(value: float, dense: float) -> str:
    return "" if value == dense else f" ({100 * (value / dense - 1):+.1f} %)"
