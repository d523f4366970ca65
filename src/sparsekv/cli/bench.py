"""`sparsekv bench`: speed, both sides measured in the same process and printed side by side.

decode and prefill time whole forwards against plain Transformers (bench/plain.py), or with --shape the attention
kernels alone, at random (bench/kernels.py). step, serve and suite time an engine with random weights, on a GPU. train
times attention with the gate beside FlexAttention, and the whole step of a retrofit (bench/train.py). host times what
the engine does in a step beside the device, on any machine (bench/host.py).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

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
_KernelShape = Annotated[str | None, Option(help="Time the kernel alone at this shape (qwen3-8b), without a model.")]
_Shape = Annotated[str, Option(help="qwen3-8b, llama-3.2-1b, smollm2-135m or tiny, with random weights.")]
_Batch = Annotated[int, Option(help="Sequences.", min=1)]
_Window = Annotated[int, Option(help="Tokens between a mark and the eviction.", min=1)]


def decode(
    model: _Model = "smollm2-135m",
    context: Annotated[int, Option(help="Tokens in the cache.", min=1)] = 4000,
    cr: _Ratio = 4.0,
    adapter: _Adapter = None,
    steps: Annotated[int, Option(help="Decoded tokens to time.", min=1)] = 40,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
    shape: _KernelShape = None,
    batch: _Batch = 1,
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
    model: _Model = "smollm2-135m",
    tokens: Annotated[int, Option(help="Tokens to read.", min=1)] = 2048,
    cr: _Ratio = 4.0,
    adapter: _Adapter = None,
    repeats: Annotated[int, Option(help="Times to read them.", min=1)] = 5,
    threads: _Threads = None,
    seed: _Seed = 0,
    as_json: _Json = False,
    shape: _KernelShape = None,
    window: _Window = 64,
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


def step(
    shape: _Shape = "qwen3-8b",
    batch: _Batch = 8,
    context: Annotated[int, Option(help="Tokens that each sequence has seen.", min=1)] = 32768,
    cr: _Ratio = 8.0,
    policy: Annotated[list[str] | None, Option(help="dms (the default), tova, quest, ... Repeatable.")] = None,
    window: _Window = 64,
    kernels: Annotated[int, Option(help="List so many of the longest kernels.", min=0)] = 0,
    seed: _Seed = 0,
    as_json: _Json = False,
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


def serve(
    rows: Annotated[str | None, Option(help="Which rows, by name and with commas between; default: all.")] = None,
    arrivals: Annotated[
        float | None, Option(help="Requests a second, at random moments; default: as each row says.", min=0.01)
    ] = None,
    http: Annotated[bool, Option("--http", help="The server, over HTTP: on a CPU the embedded model.")] = False,
    ratios: Annotated[str, Option(help="With --http: compression ratios, with commas between.")] = "1,4,8",
    requests: Annotated[int | None, Option(help="With --http: requests of a load.", min=2)] = None,
    commit: Annotated[str | None, Option(help="With --http: written to each line; default: what git says.")] = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Requests in, tokens out, by the clock on the wall: a line for each row as it is done, and for each start of an
    engine. With --http: the server at its peak, at 0.7 and at 2 times the rate of that. Else rows: short-greedy,
    short-temperature, short-top-p, churn-8, arrivals-8, middle-8, churn-1, long-1, long-8, chains-1, chains-8; the last
    number is the compression ratio, and short ones have 8."""
    from dataclasses import replace

    from sparsekv.bench.serve import WORKS, bench_serve, works_of

    if http:
        _serve_http(ratios, requests=requests, seed=seed, commit=commit, as_json=as_json)
        return
    works = WORKS if rows is None else works_of([name.strip() for name in rows.split(",")])
    if arrivals is not None:
        works = [replace(work, arrivals=arrivals) for work in works]
    _check_gpu()
    import torch

    for result in bench_serve(works, device=torch.device("cuda"), dtype=torch.bfloat16, seed=seed):
        typer.echo(json.dumps(result) if as_json else _serve_text(result))
        sys.stdout.flush()  # a run that is cut short has shown what it has


def _serve_http(ratios: str, *, requests: int | None, seed: int, commit: str | None, as_json: bool) -> None:
    """On a GPU the shape of Qwen3-8B with random weights, on a CPU the embedded model and its adapter."""
    from dataclasses import replace

    import torch

    from sparsekv.cli.models import find_adapter
    from sparsekv.server.bench import Setup, bench_http

    try:
        wanted = [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        raise ValueError(f"--ratios is {ratios!r}; write numbers with commas between, such as 1,4,8") from None
    gpu = torch.cuda.is_available()
    setup = Setup()
    if not gpu:
        small: dict[str, Any] = {"memory": 512 * 2**20, "requests": 160, "prompt": (32, 256)}
        setup = Setup(shape=None, adapter=find_adapter("smollm2-135m"), output=(16, 64), **small)
    for ratio in wanted:
        here = replace(setup, ratio=ratio, requests=requests or setup.requests)
        device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
        for result in bench_http(here, device=device, dtype=dtype, seed=seed, commit=commit):
            typer.echo(json.dumps(result) if as_json else _http_text(result))
            sys.stdout.flush()


def _http_text(result: dict[str, Any]) -> str:
    text = f"ratio {result['ratio']:g}, {result['load']}: {result['tokens_per_s']:,.1f} tokens per second"
    if result["load"] == "direct":
        return text + " by the engine alone"
    beside = f"HTTP costs {100 * result['http_cost']:.1f} %" if "http_cost" in result else ""
    beside = beside or f"{100 * result['of_peak']:.0f} % of the peak, {result['arrivals']:.2f} requests a second"
    first, gap = ((result[f"{name}_ms_p50"], result[f"{name}_ms_p99"]) for name in ("first", "gap"))
    times = f"first token {first[0]:.0f} ms, p99 {first[1]:.0f}; between tokens {gap[0]:.1f} ms, p99 {gap[1]:.1f}"
    return f"{text} ({beside}); {times}; {result['refused']} of {result['requests_sent']} refused"


def _serve_text(result: dict[str, Any]) -> str:
    if result["work"] == "start":
        return (
            f"an engine of {result['shape']} at ratio {result['ratio']:g}: ready in {result['start_s']:.1f} s, "
            f"first requests in {result['first_requests_s']:.1f} s"
        )
    text = f"{result['work']}: {result['seconds']:.2f} s, {result['tokens_per_s']:,.0f} tokens per second"
    if "gap_ms_p99" in result:
        text += f"; between tokens {result['gap_ms_median']:.1f} ms in the median, {result['gap_ms_p99']:.1f} at p99"
    return text


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
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Attention with the gate beside FlexAttention, and the whole step of a retrofit. A CPU run measures no target.

    With --processes the step alone: heads and all weights, by one process, by FSDP2 and by tensor parallelism.
    """
    import torch

    from sparsekv.bench.shapes import shape_of
    from sparsekv.bench.train import bench_train

    gpu = torch.cuda.is_available()
    if shape is None and not gpu:
        raise ValueError("the default shapes need a CUDA GPU and PyTorch sees none; use --shape tiny")
    if processes > 1:
        from sparsekv.bench.together import bench_together

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


def host(
    shape: _Shape = "qwen3-8b",
    steps: Annotated[int, Option(help="Steps to time.", min=1)] = 50,
    as_json: _Json = False,
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
    _check_gpu()
    from sparsekv.bench.suite import main

    raise typer.Exit(main([str(out), *([commit] if commit else [])]))


for _command in (decode, prefill, step, serve, train, host, suite):
    app.command(_command.__name__)(with_config(_command))


def _kernel_decode(
    shape: str, *, batch: int, context: int, cr: float, threads: int | None, seed: int, as_json: bool
) -> None:
    from sparsekv.bench.kernels import bench_decode
    from sparsekv.bench.shapes import shape_of

    _check_ratio(cr, tokens=context, window=1)
    where = _kernel_device(threads)
    result = bench_decode(shape_of(shape), batch=batch, context=context, ratio=cr, seed=seed, **where)
    text = f"{result['us']:.1f} us a layer, {result['of_copy']:.1%} of copy bandwidth"
    typer.echo(json.dumps(result) if as_json else text)


def _kernel_prefill(
    shape: str, *, tokens: int, window: int, cr: float, threads: int | None, seed: int, as_json: bool
) -> None:
    from sparsekv.bench.kernels import bench_prefill
    from sparsekv.bench.shapes import shape_of

    _check_ratio(cr, tokens=tokens, window=window)
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


def _step_bench(name: str, *, window: int, context: int, least: int, cr: float) -> Any:
    """The engine's model at that shape; contexts of `least` tokens and more must be able to hold the ratio."""
    from sparsekv.bench.shapes import shape_of

    shape = shape_of(name)
    _check_ratio(cr, tokens=least, window=window)
    _check_gpu()
    import torch

    from sparsekv.bench.step import StepBench

    return StepBench(shape, window=window, context=context, device=torch.device("cuda"), dtype=torch.bfloat16)


def _check_ratio(cr: float, *, tokens: int, window: int) -> None:
    if not (cr == 1 or 1 < cr <= tokens / window):
        raise ValueError(
            f"the ratio is {cr:g}; {tokens} tokens with a window of {window} allow 1 to {max(tokens / window, 1):.4g}"
        )


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "this benchmark replays CUDA graphs and PyTorch sees no CUDA GPU; run it on a machine with one"
        )


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
