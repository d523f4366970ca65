"""Options and refusals that several benchmarks share."""

from typing import Annotated

from typer import Option

Model = Annotated[str, Option(help="smollm2-135m, a folder, or a hub id.")]
Ratio = Annotated[float, Option(help="Compression ratio.")]
Adapter = Annotated[str | None, Option(help="Trained eviction heads; default: random marks at the ratio.")]
Threads = Annotated[int | None, Option(help="CPU threads; default: PyTorch's choice.", min=1)]
Seed = Annotated[int, Option(help="Seed of the text and of random marks.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
KernelShape = Annotated[str | None, Option(help="Time the kernel alone at this shape (qwen3-8b), without a model.")]
Shape = Annotated[str, Option(help="qwen3-8b, llama-3.2-1b, smollm2-135m or tiny, with random weights.")]
Batch = Annotated[int, Option(help="Sequences.", min=1)]
Window = Annotated[int, Option(help="Tokens between a mark and the eviction.", min=1)]


def check_ratio(cr: float, *, tokens: int, window: int) -> None:
    if not (cr == 1 or 1 < cr <= tokens / window):
        raise ValueError(
            f"the ratio is {cr:g}; {tokens} tokens with a window of {window} allow 1 to {max(tokens / window, 1):.4g}"
        )


def check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "this benchmark replays CUDA graphs and PyTorch sees no CUDA GPU; run it on a machine with one"
        )
