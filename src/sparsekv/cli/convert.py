"""`sparsekv convert`: a checkpoint of other DMS code into an adapter folder."""

import json
from dataclasses import asdict
from typing import Annotated

from typer import Argument, Option


def command(
    kind: Annotated[str, Argument(help="Whose code trained it: nvidia or fastdms.")],
    src: Annotated[str, Argument(help="The checkpoint: a folder, a file or a hub id.")],
    dst: Annotated[str, Argument(help="The adapter's folder, which is created or overwritten.")],
    base: Annotated[
        str | None, Option(help="The model that the heads were trained on, where SRC is not whole.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the adapter's configuration as JSON.")] = False,
) -> None:
    """Convert a DMS checkpoint of NVIDIA's code or of FastDMS into an adapter."""
    from sparsekv.modeling.importers import convert

    config = convert(kind, src, dst=dst, base=base)
    if as_json:
        print(json.dumps(asdict(config)))
        return
    print(
        f"{dst}: {config.source} source, window {config.window}, lag {config.lag}, trained to {config.training['cr']}x"
    )
    print(f"base model: {config.base_model_name_or_path}; `sparsekv calibrate` measures its ratios for --cr")
