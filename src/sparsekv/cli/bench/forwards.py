"""`sparsekv bench decode` and `prefill`: whole forwards beside plain Transformers, or the attention kernels alone."""

import json
from typing import Annotated, Any

import typer
from typer import Option

from sparsekv.cli.bench.options import (
    Adapter,
    Batch,
    Json,
    KernelShape,
    Model,
    Ratio,
    Seed,
    Threads,
    Window,
    check_ratio,
)
from sparsekv.cli.models import check_length, open_model


def decode(
    model: Model = "smollm2-135m",
    context: Annotated[int, Option(help="Tokens in the cache.", min=1)] = 4000,
    cr: Ratio = 4.0,
    adapter: Adapter = None,
    steps: Annotated[int, Option(help="Decoded tokens to time.", min=1)] = 40,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
    shape: KernelShape = None,
    batch: Batch = 1,
) -> None:
    """Time per decoded token: DynamicCache with SDPA, and SparseCache. With --shape: one layer's decode attention."""
    if shape is not None:
        _refuse_adapter(adapter)
        _kernel_decode(shape, batch=batch, context=context, cr=cr, threads=threads, seed=seed, as_json=as_json)
        return
    if batch != 1:
        raise ValueError("--batch needs --shape; whole models are compared one sequence at a time")
    from sparsekv.bench.plain import bench_plain_decode

    loaded, ids = _prepare(model, context + steps + 1, adapter=adapter, threads=threads, seed=seed)
    result = {"model": model} | bench_plain_decode(loaded, ids, ratio=cr, adapter=adapter, steps=steps, seed=seed)
    _show(result, f"per token at {context} tokens of context, ratio {result['ratio_held']:.2f}", as_json)


def prefill(
    model: Model = "smollm2-135m",
    tokens: Annotated[int, Option(help="Tokens to read.", min=1)] = 2048,
    cr: Ratio = 4.0,
    adapter: Adapter = None,
    repeats: Annotated[int, Option(help="Times to read them.", min=1)] = 5,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
    shape: KernelShape = None,
    window: Window = 64,
) -> None:
    """Time to read a prompt: DynamicCache with SDPA, and SparseCache. With --shape: one layer's prefill attention."""
    if shape is not None:
        _refuse_adapter(adapter)
        _kernel_prefill(shape, tokens=tokens, window=window, cr=cr, threads=threads, seed=seed, as_json=as_json)
        return
    if window != 64:
        raise ValueError("--window needs --shape; random marks over whole models have a window of 64")
    from sparsekv.bench.plain import bench_plain_prefill

    loaded, ids = _prepare(model, tokens, adapter=adapter, threads=threads, seed=seed)
    result = {"model": model} | bench_plain_prefill(loaded, ids, ratio=cr, adapter=adapter, repeats=repeats, seed=seed)
    _show(result, f"to read {tokens} tokens, ratio {cr:g}", as_json)


def _kernel_decode(
    shape: str, *, batch: int, context: int, cr: float, threads: int | None, seed: int, as_json: bool
) -> None:
    from sparsekv.bench.kernels import bench_decode
    from sparsekv.bench.shapes import shape_of

    check_ratio(cr, tokens=context, window=1)
    where = _kernel_device(threads)
    result = bench_decode(shape_of(shape), batch=batch, context=context, ratio=cr, seed=seed, **where)
    text = f"{result['us']:.1f} us a layer, {result['of_copy']:.1%} of copy bandwidth"
    typer.echo(json.dumps(result) if as_json else text)


def _kernel_prefill(
    shape: str, *, tokens: int, window: int, cr: float, threads: int | None, seed: int, as_json: bool
) -> None:
    from sparsekv.bench.kernels import bench_prefill
    from sparsekv.bench.shapes import shape_of

    check_ratio(cr, tokens=tokens, window=window)
    where = _kernel_device(threads)
    result = bench_prefill(shape_of(shape), tokens=tokens, ratio=cr, window=window, seed=seed, **where)
    text = f"{result['ms']:.3f} ms a layer, {result['sdpa_ms']:.3f} ms with causal SDPA"
    typer.echo(json.dumps(result) if as_json else f"{text} ({result['speedup']:.2f} times as fast)")


def _kernel_device(threads: int | None) -> dict[str, Any]:
    """The GPU in bfloat16 where there is one, else the CPU in float32."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    return {"device": torch.device("cuda" if gpu else "cpu"), "dtype": torch.bfloat16 if gpu else torch.float32}


def _refuse_adapter(adapter: str | None) -> None:
    if adapter is not None:
        raise ValueError("--adapter and --shape exclude each other; a shape has no model that the adapter would fit")


def _prepare(model: str, tokens: int, *, adapter: str | None, threads: int | None, seed: int) -> tuple[Any, Any]:
    """The model and int64 [1, tokens]: held-out encyclopedia text for an adapter, which holds more of what it does not
    know; else random tokens, since speed does not depend on what they say."""
    import numpy as np
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, tokenizer = open_model(model)
    config = loaded.config.get_text_config(decoder=True)
    check_length(tokens, config.max_position_embeddings)
    if adapter is None:
        ids = torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    else:
        from sparsekv.evals.corpus import Corpus, load_documents

        corpus = Corpus(load_documents(["encyclopedia"])[1], tokenizer)
        ids = torch.from_numpy(corpus.window(np.random.default_rng(seed), tokens).ids).long()
    return loaded, ids[None].to(loaded.device)


def _show(result: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['sparsekv_ms']:.1f} ms with SparseCache, {result['dense_ms']:.1f} ms with DynamicCache and SDPA "
        f"{what} ({result['speedup']:.2f} times as fast; {result['threads']} threads, medians)"
    )
