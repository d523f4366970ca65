"""`sparsekv convert`: a checkpoint of other DMS code into an adapter folder, or an adapter's LoRA merged."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def command(
    kind: Annotated[str, Argument(help="Whose code trained it, nvidia or fastdms; or merged.")],
    src: Annotated[
        str, Argument(help="The checkpoint: a folder, a file or a hub id; for merged, the adapter with LoRA.")
    ],
    dst: Annotated[
        str, Argument(help="The folder to write: an adapter; for merged, also the plain model in DST/model.")
    ],
    base: Annotated[
        str | None, Option(help="The model that the heads were trained on, where SRC is not whole or names another.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the adapter's configuration as JSON.")] = False,
) -> None:
    """Convert a DMS checkpoint of NVIDIA's code or of FastDMS into an adapter, or merge an adapter's LoRA."""
    if kind == "merged":
        from sparsekv.modeling.adapter import read_adapter
        from sparsekv.retrofit.export import export_merged

        config = export_merged(base or read_adapter(src)[0].base_model_name_or_path, src, Path(dst))
        print(
            json.dumps(config.to_dict()) if as_json else f"{config.base_model_name_or_path}, with its adapter in {dst}"
        )
        return
    from sparsekv.modeling.importers import convert

    config = convert(kind, src, dst=dst, base=base)
    if as_json:
        print(json.dumps(config.to_dict()))
        return
    print(
        f"{dst}: {config.source} source, window {config.window}, lag {config.lag}, trained to {config.training['cr']}x"
    )
    print(f"base model: {config.base_model_name_or_path}; `sparsekv calibrate` measures its ratios for --cr")
