"""`sparsekv bench train`: attention with the gate, and a step of a retrofit."""

import json
from typing import Annotated, Any

import typer
from typer import Option

from sparsekv.cli.bench.options import Json, Seed


def train(
    shape: Annotated[
        str | None, Option(help="qwen3-8b, llama-3.2-1b, smollm2-135m or tiny; default: qwen3-8b, then smollm2-135m.")
    ] = None,
    batch: Annotated[int | None, Option(help="Rows of a step; default: 16 for smollm2-135m, else 1.", min=1)] = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of a row; default: 2048 for smollm2-135m, else 8192.", min=1)
    ] = None,
    kernels: Annotated[int, Option(help="List so many of the longest kernels of a whole step.", min=0)] = 15,
    processes: Annotated[
        int, Option(help="More than 1: the step by so many processes, one a GPU, and beside it by one.", min=1)
    ] = 1,
    commit: Annotated[str | None, Option(help="Written to each line of processes; default: what git says.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Attention with the gate beside FlexAttention, and the whole step of a retrofit. A CPU run measures no target.

    With --processes the step alone: heads and all weights, by one process, by FSDP2 and by tensor parallelism.
    """
    import torch

    from sparsekv.bench.shapes import shape_of
    from sparsekv.bench.training.train import bench_train

    gpu = torch.cuda.is_available()
    if shape is None and not gpu:
        raise ValueError("the default shapes need a CUDA GPU and PyTorch sees none; use --shape tiny")
    if processes > 1:
        from sparsekv.bench.training.together import bench_together

        def keep(line: dict[str, Any]) -> None:
            typer.echo(json.dumps(line) if as_json else _together_text(line))

        found = shape_of(shape or "qwen3-8b")
        bench_together(
            found, processes=processes, batch=batch or 1, tokens=tokens or 8192, seed=seed, keep=keep, commit=commit
        )
        return
    for found in map(shape_of, ("qwen3-8b", "smollm2-135m") if shape is None else (shape,)):
        small = found.name == "smollm2-135m"
        result = bench_train(
            found,
            batch=batch or (16 if small else 1),
            tokens=tokens or (2048 if small else 8192),
            device=torch.device("cuda" if gpu else "cpu"),
            dtype=torch.bfloat16 if gpu else torch.float32,
            kernels=kernels,
            seed=seed,
        )
        typer.echo(json.dumps(result) if as_json else _train_text(result))


def _together_text(line: dict[str, Any]) -> str:
    what = f"{line['way']}, {line['trainable']}, {line['layers']} layers: "
    if "error" in line:
        return what + line["error"]
    peak = "" if line["peak_bytes"] is None else f", at most {line['peak_bytes'] / 2**30:.1f} GiB a GPU"
    return what + f"{line['ms']:.1f} ms, {line['of_matmul']:.1%} of the product{peak}"


def _train_text(result: dict[str, Any]) -> str:
    step, layers = result["step"], result["step"]["extrapolated_from_layers"]
    lines = [
        f"{result['shape']}, {result['batch']} x {result['tokens']} tokens; a large product of matrices: "
        f"{result['matmul_tflops']:.0f} TFLOP/s",
        *(
            f"attention, {name}: {found['ms']:.3f} ms forward and backward, {found['tflops']:.0f} TFLOP/s"
            for name, found in result["attention"]["backends"].items()
        ),
        f"a step: {step['ms']:.1f} ms, {step['tokens_per_s']:.0f} tokens/s, {step['of_matmul']:.1%} of the product"
        + ("" if layers is None else f" (extrapolated from {' and '.join(map(str, layers))} layers)"),
    ]
    return "\n".join(lines + ([result["note"]] if "note" in result else []))
