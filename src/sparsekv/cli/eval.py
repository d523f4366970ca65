"""`sparsekv eval`: perplexity, divergence from dense, and retrieval, each beside its measured ratio."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from sparsekv.cli.models import attach_from_options, open_model
from sparsekv.evals.settings import EvaluationConfig

if TYPE_CHECKING:
    from sparsekv.evals.evaluate import Point


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    cr: Annotated[list[float] | None, Option(help="Compression ratio of the adapter. Repeatable.")] = None,
    policy: Annotated[str | None, Option(help="A policy without training, such as streaming.")] = None,
    budget: Annotated[int | None, Option(help="Tokens that the policy may hold per head.")] = None,
    text: Annotated[str, Option(help="encyclopedia, a text file, or a folder of .txt files.")] = "encyclopedia",
    rows: Annotated[int, Option(help="Held-out texts for perplexity and divergence.")] = 2,
    length: Annotated[int, Option(help="Tokens of each.")] = 2048,
    items: Annotated[int, Option(help="Retrieval items of each kind and context.")] = 4,
    context: Annotated[list[int] | None, Option(help="Context of the retrieval items. Repeatable.")] = None,
    batch: Annotated[int, Option(help="Texts of one forward.")] = 1,
    seconds: Annotated[float, Option(help="No further ratio is begun after this time.")] = 3600.0,
    seed: Annotated[int, Option(help="Seed of the retrieval items.")] = 0,
    through: Annotated[str, Option(help="cache, the real one, or mask: the same rule, fast on a GPU.")] = "cache",
    as_json: Annotated[bool, Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure what a ratio costs on the held-out part of a text, teacher-forced through the real cache."""
    settings = EvaluationConfig(
        ratios=cr or [2.0, 4.0, 8.0],
        rows=rows,
        length=length,
        items=items,
        contexts=context or [1024, 2048],
        batch=batch,
        seconds=seconds,
        seed=seed,
    )
    if adapter is None and cr:
        raise ValueError("--cr picks a ratio of a trained adapter: pass --adapter too, or --policy with --budget")
    from sparsekv.evals.corpus import load_documents
    from sparsekv.evals.evaluate import Score, describe, evaluate

    points = _points(adapter, settings.ratios)
    loaded, tokenizer = open_model(model)
    attach_from_options(loaded, adapter=adapter, cr=None, policy=policy, budget=budget)

    def show(score: Score) -> None:
        typer.echo(describe(score), err=as_json)

    documents = load_documents([text])[1]
    scores = evaluate(
        loaded, tokenizer, documents=documents, points=points, settings=settings, through=through, on_score=show
    )
    if as_json:
        values = [score.to_dict() for score in scores]
        typer.echo(json.dumps({"model": model, "text": text, "through": through, "scores": values}))
        return
    if len(scores) < len(points):
        typer.echo(f"{len(points) - len(scores)} ratios were left out: the {seconds:g} seconds were over", err=True)


def _points(adapter: str | None, ratios: list[float]) -> list["Point"]:
    """The dial's settings for an adapter's ratios; the policy as it is where there is no adapter."""
    from sparsekv.evals.evaluate import Point
    from sparsekv.modeling.adapter import read_adapter

    if adapter is None:
        return [Point()]
    table = read_adapter(adapter)[0]
    return [Point(asked=ratio, offset=table.offset_for(ratio)) for ratio in ratios]
