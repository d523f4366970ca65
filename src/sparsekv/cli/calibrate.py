"""`sparsekv calibrate`: measure which offset gives which ratio at which length, and keep the table in the adapter."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from typer import Argument, Option

TARGETS = "1.1,1.25,1.5,2,2.5,3,4,5,6,7,8"
LENGTHS = "512,1024,4096,8192"


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    adapter: Annotated[str, Option(help="The adapter's folder; its table is replaced.")],
    text: Annotated[
        str, Option(help="encyclopedia, handbook, bible, a text file, or a folder of .txt files.")
    ] = "encyclopedia",
    targets: Annotated[str, Option(help="Compression ratios, with commas between.")] = TARGETS,
    rows: Annotated[int, Option(help="Stretches of text, of each length.")] = 4,
    length: Annotated[int, Option(help="Tokens of each; the targets are for this length.")] = 2048,
    lengths: Annotated[
        str, Option(help="Further lengths to measure the same offsets at; those that the text has not are left out.")
    ] = LENGTHS,
    as_json: Annotated[bool, Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Measure an adapter's table of ratios, by length, on the held-out part of a text, through the real cache."""
    from sparsekv.evals.calibrate import recalibrate
    from sparsekv.evals.settings import CalibrationConfig
    from sparsekv.modeling.adapter import read_adapter

    try:
        ratios = [float(part) for part in targets.split(",")]
    except ValueError:
        raise ValueError(f"--targets is {targets!r}; write ratios with commas between, such as 2,4,8") from None
    try:
        further = [int(part) for part in lengths.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--lengths is {lengths!r}; write tokens with commas between, such as 512,8192") from None
    settings = CalibrationConfig(targets=ratios, rows=rows, length=length, lengths=further)
    from sparsekv.cli.models import open_model

    loaded, tokenizer = open_model(model)
    table = recalibrate(
        loaded,
        tokenizer,
        adapter=adapter,
        text=text,
        settings=settings,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        written = read_adapter(adapter)[0]
        record = {"adapter": adapter, "text": text, "length": written.calibration["length"]}
        typer.echo(json.dumps(record | {"offsets": [asdict(dial) for dial in table], "ratios": written.ratios}))
    else:
        typer.echo(f"{len(table)} rows written to {adapter}")
