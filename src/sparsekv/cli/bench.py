"""`sparsekv bench`: speed, both sides measured in the same process and printed side by side.

decode and prefill time whole forwards against plain Transformers (bench/plain.py).
"""

import json
from typing import Annotated, Any

import typer
from typer import Option

from sparsekv.cli.config import with_config
from sparsekv.cli.models import check_length, open_model

app = typer.Typer(
    help="Speed, side by side with plain Transformers.", no_args_is_help=True, pretty_exceptions_enable=False
)

_Model = Annotated[str, Option(help="smollm2-135m, a folder, or a hub id.")]
_Ratio = Annotated[float, Option(help="Compression ratio.")]
_Adapter = Annotated[str | None, Option(help="Trained eviction heads; default: random marks at the ratio.")]
_Threads = Annotated[int | None, Option(help="CPU threads; default: PyTorch's choice.", min=1)]
_Seed = Annotated[int, Option(help="Seed of the text and of random marks.")]
_Json = Annotated[bool, Option("--json", help="Print JSON.")]


def decode(
    model: _Model = "smollm2-135m",
    context: Annotated[int, Option(help="Tokens in the cache.", min=1)] = 4000,
    cr: _Ratio = 4.0,
    adapter: _Adapter = None,
    steps: Annotated[int, Option(help="Decoded tokens to time.", min=1)] = 40,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Time per decoded token: DynamicCache with SDPA, and SparseCache."""
    from sparsekv.bench.plain import bench_plain_decode

    loaded, ids = _prepare(model, context, reserve=steps + 1, threads=threads, seed=seed)
    result = {"model": model} | bench_plain_decode(loaded, ids, ratio=cr, adapter=adapter, steps=steps, seed=seed)
    _show(result, f"per token at {context} tokens of context, ratio {result['ratio_held']:.2f}", as_json)


def prefill(
    model: _Model = "smollm2-135m",
    tokens: Annotated[int, Option(help="Tokens to read.", min=1)] = 2048,
    cr: _Ratio = 4.0,
    adapter: _Adapter = None,
    repeats: Annotated[int, Option(help="Times to read them.", min=1)] = 5,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Time to read a prompt into an empty cache: DynamicCache with SDPA, and SparseCache."""
    from sparsekv.bench.plain import bench_plain_prefill

    loaded, ids = _prepare(model, tokens, reserve=0, threads=threads, seed=seed)
    result = {"model": model} | bench_plain_prefill(loaded, ids, ratio=cr, adapter=adapter, repeats=repeats, seed=seed)
    _show(result, f"to read {tokens} tokens, ratio {cr:g}", as_json)


app.command("decode")(with_config(decode))
app.command("prefill")(with_config(prefill))


def _prepare(model: str, tokens: int, *, reserve: int, threads: int | None, seed: int) -> tuple[Any, Any]:
    """The model and random tokens int64 [1, tokens]: speed does not depend on what they say."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, _ = open_model(model)
    config = loaded.config.get_text_config(decoder=True)
    check_length(tokens + reserve, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return loaded, ids.to(loaded.device)


def _show(result: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['sparsekv_ms']:.1f} ms with SparseCache, {result['dense_ms']:.1f} ms with DynamicCache and SDPA "
        f"{what} ({result['speedup']:.2f} times as fast; {result['threads']} threads, medians)"
    )
