"""`sparsekv bench serve`: requests in, tokens out, through the engine or over HTTP."""

import json
import sys
from typing import Annotated, Any

import typer
from typer import Option

from sparsekv.cli.bench.options import Json, Seed, check_gpu


def serve(
    rows: Annotated[str | None, Option(help="Which rows, by name and with commas between; default: all.")] = None,
    arrivals: Annotated[
        float | None, Option(help="Requests a second, at random moments; default: as each row says.", min=0.01)
    ] = None,
    http: Annotated[bool, Option("--http", help="The server, over HTTP: on a CPU the embedded model.")] = False,
    ratios: Annotated[str, Option(help="With --http: compression ratios, with commas between.")] = "1,4,8",
    requests: Annotated[int | None, Option(help="With --http: requests of a load.", min=2)] = None,
    commit: Annotated[str | None, Option(help="With --http: written to each line; default: what git says.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
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
    check_gpu()
    import torch

    for result in bench_serve(works, device=torch.device("cuda"), dtype=torch.bfloat16, seed=seed):
        typer.echo(json.dumps(result) if as_json else _serve_text(result))
        sys.stdout.flush()  # a run that is cut short has shown what it has


def _serve_http(ratios: str, *, requests: int | None, seed: int, commit: str | None, as_json: bool) -> None:
    """On a GPU the shape of Qwen3-8B with random weights, on a CPU the embedded model and its adapter."""
    from dataclasses import replace

    import torch

    from sparsekv.cli.models import find_adapter
    from sparsekv.server.load.bench import Setup, bench_http

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
