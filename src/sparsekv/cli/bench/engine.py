"""`sparsekv bench step`, `host` and `suite`: the engine with random weights."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.bench.options import Batch, Json, Ratio, Seed, Shape, Window, check_gpu, check_ratio


def step(
    shape: Shape = "qwen3-8b",
    batch: Batch = 8,
    context: Annotated[int, Option(help="Tokens that each sequence has seen.", min=1)] = 32768,
    cr: Ratio = 8.0,
    policy: Annotated[list[str] | None, Option(help="dms (the default), tova, quest, ... Repeatable.")] = None,
    window: Window = 64,
    kernels: Annotated[int, Option(help="List so many of the longest kernels.", min=0)] = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A whole decode step of the engine beside its roofline; --cr 1 is dense. Every policy holds context / cr tokens
    (Quest reads so many), and runs in the same model, compiled once."""
    from sparsekv.policies.registry import describe

    policies = policy or ["dms"]
    for name in policies:
        describe(name)
    bench = _step_bench(shape, window=window, context=context, least=context, cr=cr)
    for name in policies:
        result = bench.run(batch=batch, context=context, ratio=cr, policy=name, seed=seed, kernels=kernels)
        text = (
            f"{result['policy']}: {result['ms']:.2f} ms a step, {result['over_roofline']:.2f} times its roofline of "
            f"{result['roofline_ms']:.2f} ms; the dense roofline is {result['dense_roofline_ms']:.2f} ms"
        )
        listed = [f"{k['ms']:8.3f} ms {k['launches']:4.0f} x {k['kernel']}" for k in result.get("kernels", [])]
        typer.echo(json.dumps(result) if as_json else "\n".join([text, *listed]))


def host(
    shape: Shape = "qwen3-8b",
    steps: Annotated[int, Option(help="Steps to time.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """The engine's own work in a decode step, over a device that answers at once: 64 and 256 sequences, after 0 and
    8,192 tokens of output, with text for a stop string, as streams, and without; then 2,048 that end after 500 tokens
    in the mean, and others take their rows."""
    from sparsekv.bench.host import TEXTS, bench_host
    from sparsekv.bench.shapes import shape_of

    works: list[dict[str, Any]] = [
        {"sequences": sequences, "output": output, "text": text}
        for sequences in (64, 256)
        for output in (0, 8192)
        for text in TEXTS
    ]
    for work in [*works, {"sequences": 2048, "output": 0, "ending": 500}]:
        result = bench_host(shape_of(shape), **work, steps=steps)
        line = f"{result['mean_ms']:.2f} ms a step of {result['sequences']} sequences after {result['output']} tokens"
        line += f", text: {result['text']}" + (f"; {result['ended']} ended" if result["ending"] else "")
        typer.echo(json.dumps(result) if as_json else line)


def suite(
    out: Annotated[Path, Argument(help="JSON lines, one a figure.")],
    commit: Annotated[str | None, Option(help="Written to each line; default: what git says.")] = None,
) -> None:
    """Every figure of docs/performance.md, in one run."""
    check_gpu()
    from sparsekv.bench.suite import main

    raise typer.Exit(main([str(out), *([commit] if commit else [])]))


def _step_bench(name: str, *, window: int, context: int, least: int, cr: float) -> Any:
    """The engine's model at that shape; contexts of `least` tokens and more must be able to hold the ratio."""
    from sparsekv.bench.shapes import shape_of

    shape = shape_of(name)
    check_ratio(cr, tokens=least, window=window)
    check_gpu()
    import torch

    from sparsekv.bench.step import StepBench

    return StepBench(shape, window=window, context=context, device=torch.device("cuda"), dtype=torch.bfloat16)
