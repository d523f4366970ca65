"""The tables of two GPUs in docs/performance.md: of this study's lines and of `sparsekv bench train --processes`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsekv.json_lines import read_lines
from sparsekv.markdown import replaced, table
from sparsekv.studies.processes.compare import TIMES, Line, same_steps
from sparsekv.studies.processes.runs import RUNS

BLOCK = "two-gpus"
NOT_MEASURED = "Not measured yet."
_WAYS = {"alone": "one GPU", "replicas": "two replicas", "shards": "FSDP2", "halves": "tensor parallel"}
_VERDICTS = {True: "yes", False: "**no**", None: "-"}


def write_page(results: Path, page: Path) -> None:
    """Rewrite the block of a page. Raises ValueError for a file without lines of either kind."""
    page.write_text(replaced(page, block(read_lines(results)), name=BLOCK), encoding="utf-8")


def block(lines: list[Line]) -> str:
    """The latest line of each run, and of each measurement of a training step."""
    runs = {line["run"]: line for line in lines if line.get("study") == "processes"}
    steps = {_key(line): line for line in lines if line.get("bench") == "train together"}
    if not runs and not steps:
        raise ValueError("the results hold no line of sparsekv.studies.processes or of bench train --processes")
    return "\n\n".join([*_losses(list(runs.values())), *_shapes(list(steps.values()))])


def _key(line: Line) -> tuple[Any, ...]:
    return (*(line[key] for key in ("shape", "way", "trainable", "layers")), bool(line["extrapolated_from"]))


def _losses(lines: list[Line]) -> Iterable[str]:
    if not lines:
        return
    made = [line for line in lines if "error" not in line]
    first = made[0] if made else {}
    if made:
        steps = max(len(line["losses"]) for line in made)
        yield (
            f"Losses of {steps} steps of {first['batch']} x {first['length']} tokens beside those of one process; "
            f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, seed {first['seed']}."
        )
    head = ("run", "beside", "worst difference", "bound", "within", "loss changes in a step by", "s a step", "peak GiB")
    yield table(head, [_loss_row(line) for line in lines])
    yield (
        f"Bound: {TIMES} times the noise, the worst difference between `{'`, `'.join(_noises(lines))}` and the run "
        "that each is beside: they differ in the order of sums and in where bfloat16 rounds, and in nothing else. "
        "Peak: of the first GPU. Seconds: where the run had its GPUs to itself."
    )
    yield from _like_one_in_parts({line["run"]: line for line in made})


def _like_one_in_parts(made: dict[str, Line]) -> Iterable[str]:
    """Replicas and shards sum what one process sums that takes a step's rows in two parts."""
    said = []
    for name, line in made.items():
        split = f"{line['like']}-split"
        if line["way"] in ("replicas", "shards") and split in made:
            steps = same_steps(line["losses"], made[split]["losses"])
            said.append(f"`{name}` has the losses of `{split}` to the last bits in its first {steps} steps")
    if said:
        yield "; ".join(said) + ": both sum the same two parts of each step's rows."


def _noises(lines: list[Line]) -> list[str]:
    return [line["run"] for line in lines if RUNS[line["run"]].noise]


def _loss_row(line: Line) -> tuple[str, ...]:
    what = f"{line['run']}: {_WAYS[line['way']]}, {line['trainable']}"
    if "error" in line:
        return (what, line["like"] or "-", _cell(f"failed: {line['error']}"), *["-"] * 5)
    if "killed_after" in line:
        what += f", killed after step {line['killed_after']}, resumed from {line['resumed_from']}"
    return (
        what,
        line["like"] or "-",
        _small(line.get("worst")),
        _small(line.get("bound")),
        "noise" if RUNS[line["run"]].noise else _VERDICTS[line.get("within")],
        _small(line.get("scale")),
        f"{line['seconds_per_step']:.3f}" if line["own_gpus"] else "-",
        "-" if line["memory_gib"] is None else f"{line['memory_gib']:.1f}",
    )


def _shapes(lines: list[Line]) -> Iterable[str]:
    if not lines:
        return
    first = next((line for line in lines if "error" not in line), lines[0])
    where = "none made"
    if "hardware" in first:
        where = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}"
    yield (
        f"One step of a retrofit at the {first['shape']} shape, random weights, rows of {first['tokens']} tokens; "
        f"{where}, seed {first['seed']}; medians."
    )
    head = ("what is trained", "how", "layers", "rows", "s a step", "tokens/s", "TFLOP/s a GPU", "of the product")
    yield table((*head, "peak GiB a GPU"), [_shape_row(line) for line in lines])
    yield (
        "The product: of large matrices, in the same run. All weights: float32 with AdamW, a bfloat16 teacher, layers "
        "computed again in the backward (not counted). Where the whole does not fit, a line through two depths gives "
        "its time."
    )


def _shape_row(line: Line) -> tuple[Any, ...]:
    depths = f", from {' and '.join(map(str, line['extrapolated_from']))}" if line["extrapolated_from"] else ""
    what = (line["trainable"], _WAYS[line["way"]], f"{line['layers']}{depths}", line["rows"])
    if "error" in line:
        return (*what, _cell(line["error"]), *["-"] * 4)
    peak = "-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**30:.1f}"
    speed = (f"{line['tflops']:.0f}", f"{line['of_matmul']:.0%}")
    return (*what, f"{line['ms'] / 1e3:.2f}", f"{line['tokens_per_s']:,.0f}", *speed, peak)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
