"""`sparsekv scale`: chains of many widths and lengths at many ratios, and what they are right about at equal cost."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def command(
    study: Annotated[Path, Argument(help="What is drawn, as YAML: see docs/scaling.md and studies/.")],
    out: Annotated[
        Path | None, Option(help="A folder; what it holds is not drawn again. Default: scale-runs/NAME.")
    ] = None,
    only: Annotated[
        str | None,
        Option(help="Cells, methods or tasks, with commas between; * fits anything: 'dms@*,dense'."),
    ] = None,
    seconds: Annotated[float, Option(help="No batch is begun that would end later.")] = float("inf"),
    cells: Annotated[bool, Option("--cells", help="List the cells that are still to be drawn, and stop.")] = False,
    report_only: Annotated[bool, Option("--report", help="Draw nothing: report what there is.")] = False,
    markdown: Annotated[Path | None, Option(help="A page whose block between its markers is rewritten.")] = None,
    ray: Annotated[
        str | None, Option(help="Address of a Ray cluster, such as auto: its GPUs draw cells side by side.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print results and margins as JSON.")] = False,
) -> None:
    """Draw what OUT lacks, then write OUT/report.html, its pictures and the lines of its numbers."""
    from sparsekv.studies.scale.study import load_study

    loaded, folder = load_study(study), out or Path("scale-runs") / study.stem
    names = None if only is None else [name.strip() for name in only.split(",")]
    from sparsekv.cli.models import quiet
    from sparsekv.studies.scale.report.page import check_page, report
    from sparsekv.studies.scale.report.scores import score
    from sparsekv.studies.scale.run import lacking, run

    quiet()
    if markdown is not None:
        check_page(markdown)
    if cells:
        typer.echo("\n".join(cell.name for cell in lacking(loaded, folder, only=names)))
        return
    if not report_only:
        if ray is None:
            run(loaded, folder, only=names, seconds=seconds)
        else:
            from sparsekv.studies.scale.cluster import run_on_ray

            run_on_ray(loaded, folder, address=ray, only=names)
        score(loaded, folder)
    found = report(loaded, folder, markdown=markdown)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"wrote {found['page']}", err=True)
