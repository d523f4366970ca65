"""`sparsekv plan`: what a decode step costs on a device before anything is run, by the paper's cost model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from sparsekv.cost import (
    HARDWARE,
    MAX_CONTEXT,
    SHAPES,
    Hardware,
    Limits,
    Measured,
    ModelShape,
    Rates,
    against_measured,
    chains,
    hardware_of,
    plan,
    shape_from_config,
    shape_of,
)
from sparsekv.cost.shapes import ALIASES

RESULTS = "benchmarks/results"
_SHORTEST = 4096


def command(
    model: Annotated[str, Argument(help=f"{', '.join(SHAPES)}, a model's folder, or a hub id.")],
    gpu: Annotated[str, Option(help=f"{', '.join(HARDWARE)}, or a YAML file of your own.")] = "h100-sxm",
    batch: Annotated[int, Option(help="Sequences of one step.")] = 1,
    context: Annotated[int, Option(help="Tokens of each.")] = 8192,
    cr: Annotated[
        list[float] | None, Option(help="Compression ratio, beside dense; default 2, 4, 8. Repeatable.")
    ] = None,
    memory: Annotated[str | None, Option(help="For weights, keys and values, such as 40GiB; default: all.")] = None,
    step_ms: Annotated[float, Option(help="The longest that a step may take, in milliseconds.")] = float("inf"),
    grid: Annotated[float | None, Option(help="Grams of CO2 per kWh of the electricity.")] = None,
    price: Annotated[float | None, Option(help="Price of the GPU per hour, in any currency.")] = None,
    plot: Annotated[Path | None, Option(help="Draw latency against context here, as PNG.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """FLOPs, bytes, latency, what fits, energy and cost of decode steps, dense and at compression ratios."""
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise ValueError(f"cannot draw {plot}; --plot takes a .png file in a folder that exists")
    hardware, shape = hardware_of(gpu), _shape(model)
    limits = Limits(memory=_bytes(memory, hardware=hardware), seconds=step_ms / 1e3)
    rates = Rates(grams_per_kwh=grid, price_per_hour=price)
    ratios = sorted({1.0, *(cr or (2.0, 4.0, 8.0))})
    plans = [
        plan(shape, hardware, batch=batch, context=context, ratio=ratio, limits=limits, rates=rates) for ratio in ratios
    ]
    contexts = [_SHORTEST << i for i in range(9) if _SHORTEST << i <= min(max(shape.context, context), MAX_CONTEXT)]
    grid_of_chains = chains(shape, hardware, contexts=contexts or [context], ratios=ratios, limits=limits)
    steps = _measured(shape, hardware)
    from sparsekv.cli.plan.report import draw, show

    if plot is not None:
        draw(shape, hardware, batch=batch, ratios=ratios, limits=limits, file=plot)
        typer.echo(f"wrote {plot}", err=True)
    if as_json:
        record = {
            "shape": asdict(shape),
            "gpu": asdict(hardware),
            "batch": batch,
            "context": context,
            "plans": [one.to_dict() for one in plans],
            "chains": grid_of_chains,
            "measured": [step.to_dict() for step in steps],
        }
        typer.echo(json.dumps(record))
    else:
        show(shape, hardware, batch=batch, context=context, plans=plans, chains=grid_of_chains, measured=steps)


def _shape(model: str) -> ModelShape:
    """A named shape, or the configuration of a folder or hub id."""
    if ALIASES.get(model, model) in SHAPES:
        return shape_of(model)
    from transformers import AutoConfig

    from sparsekv.cli.models import quiet

    quiet()
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(" .:")
        raise ValueError(
            f"cannot plan for {model}: it is neither one of {', '.join(SHAPES)}, nor a folder with a config.json, nor "
            f"a model that the hub gives ({reason})"
        ) from None
    return shape_from_config(model, config.to_dict())


def _bytes(memory: str | None, *, hardware: Hardware) -> float:
    if memory is None:
        return hardware.memory
    from sparsekv.cache.pages import parse_bytes

    return parse_bytes(memory)


def _measured(shape: ModelShape, hardware: Hardware) -> list[Measured]:
    """From the results files in the repository, here or in the source checkout; none where there are none."""
    for root in (Path(), Path(__file__).parents[3]):
        files = sorted((root / RESULTS).glob("*.jsonl"))
        if files:
            lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
            rows = [row for row in map(json.loads, lines) if row.get("bench") == "step"]
            return against_measured(rows, shape=shape, hardware=hardware)
    return []
