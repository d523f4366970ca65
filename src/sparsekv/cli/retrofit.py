"""`sparsekv retrofit`: train, calibrate and evaluate an adapter from one YAML file; goes on where it was stopped."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def command(
    config: Annotated[Path, Argument(help="A YAML file such as configs/smollm2-135m.yaml.")],
    overrides: Annotated[
        list[str] | None, Option("--set", help="key=value, over the file's; dotted keys reach inside. Repeatable.")
    ] = None,
) -> None:
    """Teach a model's attention heads which tokens they can forget, and write the adapter."""
    from sparsekv.retrofit.config import load_config

    settings = load_config(config, overrides=overrides or [])
    from sparsekv.cli.models import quiet
    from sparsekv.retrofit.run import run

    quiet()
    typer.echo(str(run(settings)))
