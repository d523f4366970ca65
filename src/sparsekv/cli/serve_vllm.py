"""`sparsekv serve --engine vllm`: vLLM's own server with our plugin, in this process's place."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from typer import Context

if TYPE_CHECKING:
    from sparsekv.evals.methods.setting import Setting

SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs, also where vLLM's command cannot be had (its builds for CPUs)."""
TAKES = ("model", "behind", "engine", "adapter", "policy", "cr", "length", "budget", "option", "host", "port", "name")


def check_given(ctx: Context) -> None:
    """Raises ValueError for an option of our own server, which vLLM's would ignore."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = ctx.get_parameter_source(name)
        if name not in (*TAKES, "config") and source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP"):
            raise ValueError(f"{parameter.opts[0]} is for our own engine; give vLLM's options behind --")


def server_command(
    model: str,
    setting: "Setting",
    *,
    length: int | None,
    host: str,
    port: int,
    name: str,
    behind: Sequence[str],
) -> list[str]:
    """The command line of vLLM's server. behind: vLLM's own options, which win over ours.

    Raises ValueError for a setting that the plugin cannot have.
    """
    from sparsekv.integrations.vllm import engine_args, serve_arguments

    arguments = engine_args(
        model,
        adapter=setting.adapter,
        cr=setting.cr,
        tokens=length,
        policy=setting.policy,
        budget=setting.budget,
        **setting.options,
    )
    here = ["--host", host, "--port", str(port), "--served-model-name", name]
    return [sys.executable, "-m", SERVER, "--model", *serve_arguments(arguments), *here, *behind]


def run(command: Sequence[str]) -> None:
    """Become that command. Raises ValueError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ValueError("--engine vllm needs vLLM in this environment; run pip install 'sparsekv[vllm]'")
    os.execv(command[0], list(command))
