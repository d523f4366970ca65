"""`sparsekv`: the commands by name, loaded when they are called, so that `--help` imports no framework.

A ValueError is the user's mistake: its sentence goes to stderr and the exit code is 2, and so it is where the system
refuses a file or its disk is full. An interrupt exits with 130.
"""

import contextlib
import errno
import os
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from sparsekv import __version__
from sparsekv.cli.config import with_config

_COMMANDS = {
    "demo": (
        "sparsekv.cli.demo.command",
        "The embedded model: what compression costs and saves, in two minutes on a CPU.",
    ),
    "generate": ("sparsekv.cli.generate", "Text from a prompt, with a cache that forgets."),
    "serve": ("sparsekv.cli.serve", "An OpenAI-compatible server, and a page that shows what is forgotten."),
    "retrofit": ("sparsekv.cli.retrofit", "Teach a model's attention heads which tokens they can forget."),
    "calibrate": ("sparsekv.cli.calibrate", "Measure an adapter's table of ratios."),
    "eval": ("sparsekv.cli.eval", "Score a model on tasks, with a cache that forgets."),
    "policies": ("sparsekv.cli.policies", "The methods: what they do, need and free."),
    "inspect": (
        "sparsekv.cli.inspect.command",
        "Which head forgot which token of a text, by any method, as JSON, page and picture.",
    ),
    "convert": (
        "sparsekv.cli.convert",
        "A checkpoint of other DMS code into an adapter; a LoRA merged into a plain model.",
    ),
    "scale": ("sparsekv.cli.scale", "Many chains of many lengths at many ratios: what is right at equal cost."),
    "plan": ("sparsekv.cli.plan.command", "What a decode step will cost on a GPU: latency, memory, energy, price."),
    "vllm-args": ("sparsekv.cli.vllm_args", "The arguments that make `vllm serve` forget."),
    "bench": ("sparsekv.cli.bench.command", "Speed, side by side with plain Transformers."),
}
"""Name -> (module, one line of help)."""


class _Commands(TyperGroup):
    """Lists the table; imports a command's module only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _stub(cmd_name) if cmd_name in _COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and name and _load(name), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader such as `head` that has seen enough
                raise
            print(f"Error: {_about(error)}", file=sys.stderr)
            _drop_output()
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _about(error: OSError) -> str:
    """What the system refused, in one sentence."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    return f"cannot write the output: {reason}" if error.errno == errno.ENOSPC else reason


def _drop_output() -> None:
    """Let what stdout could not take go, so that Python does not try, and fail, once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="sparsekv",
    cls=_Commands,
    help="A KV cache that is really smaller, because every attention head learns which tokens it can forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _stub(name: str) -> Any:
    """A command that only has a name and a help line."""
    single = typer.Typer(add_completion=False)
    single.command(name, help=_COMMANDS[name][1])(lambda: None)
    return typer.main.get_command(single)


def _load(name: str) -> Any:
    module = import_module(_COMMANDS[name][0])
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(with_config(module.command))
    return typer.main.get_command(single)


def main() -> None:
    """The entry point of the `sparsekv` script."""
    typer.main.get_command(app)(prog_name="sparsekv")


if __name__ == "__main__":
    main()
