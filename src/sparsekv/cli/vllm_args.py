"""`sparsekv vllm-args`: the arguments that put the plugin to work in `vllm serve`."""

import json
from typing import Annotated

import typer
from typer import Argument, Option


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    cr: Annotated[float | None, Option(help="Compression ratio of the adapter; default: as trained.")] = None,
    length: Annotated[int | None, Option(help="Tokens that --cr is meant for; default: those of the table.")] = None,
    policy: Annotated[str, Option(help="dms, with an adapter, or streaming, with a budget.")] = "dms",
    budget: Annotated[int | None, Option(help="Tokens that each head may hold.")] = None,
    sinks: Annotated[int, Option(help="First tokens that streaming never forgets.")] = 4,
    trusted_ratio: Annotated[
        float, Option(help="Let one context be so many times longer than the cache holds densely.")
    ] = 1.0,
    as_json: Annotated[bool, Option("--json", help="Print the keywords of vllm.LLM as JSON.")] = False,
) -> None:
    """Print what comes behind `vllm serve`, for a shell: add vLLM's own options to it."""
    from sparsekv.integrations.vllm import engine_args, serve_arguments
    from sparsekv.integrations.vllm.arguments import command_line

    arguments = engine_args(
        model,
        adapter=adapter,
        cr=cr,
        tokens=length,
        policy=policy,
        budget=budget,
        sinks=sinks,
        trusted_ratio=trusted_ratio,
    )
    typer.echo(json.dumps(arguments) if as_json else command_line(serve_arguments(arguments)))
