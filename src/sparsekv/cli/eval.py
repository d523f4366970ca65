"""`sparsekv eval`: perplexity, divergence from dense, and retrieval, each beside its measured ratio."""

import json
from dataclasses import asdict
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
    text: Annotated[
        str, Option(help="encyclopedia, handbook, bible, a text file, or a folder of .txt files.")
    ] = "encyclopedia",
    rows: Annotated[int, Option(help="Held-out texts for perplexity and divergence.")] = 2,
    length: Annotated[int, Option(help="Tokens of each.")] = 2048,
    items: Annotated[int, Option(help="Retrieval items of each kind and context.")] = 4,
    contexts: Annotated[str, Option(help="Tokens of the retrieval items, with commas between.")] = "1024,2048",
    kinds: Annotated[str, Option(help="Of retrieval: pass key, unseen, look-up.")] = "pass key,unseen",
    answers: Annotated[str, Option(help="Retrieval teacher-forced (forced), or generated token by token.")] = "forced",
    other_texts: Annotated[str, Option(help="Texts of other domains, such as handbook,bible.")] = "",
    long_lengths: Annotated[str, Option(help="Further lengths of held-out text, such as 4096,8192.")] = "",
    same_ratio: Annotated[
        bool, Option(help="Dial each text to the ratio asked for, instead of one offset for all.")
    ] = False,
    batch: Annotated[int, Option(help="Texts of one forward.")] = 1,
    seconds: Annotated[float, Option(help="No further ratio is begun after this time.")] = 3600.0,
    seed: Annotated[int, Option(help="Seed of the retrieval items.")] = 0,
    eviction: Annotated[str, Option(help="cache, the real one, or mask: the same rule without it.")] = "cache",
    as_json: Annotated[bool, Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure what a ratio costs on the held-out part of a text, teacher-forced through the real cache."""
    settings = EvaluationConfig(
        ratios=cr or [2.0, 4.0, 8.0],
        rows=rows,
        length=length,
        items=items,
        contexts=_numbers("contexts", contexts),
        kinds=_names(kinds),
        answers=answers,
        other_texts=_names(other_texts),
        long_lengths=_numbers("long-lengths", long_lengths),
        same_ratio=same_ratio,
        eviction=eviction,
        batch=batch,
        seconds=seconds,
        seed=seed,
    )
    if adapter is None and cr:
        raise ValueError("--cr picks a ratio of a trained adapter: pass --adapter too, or --policy with --budget")
    from sparsekv.evals.corpus import load_documents, other_documents
    from sparsekv.evals.evaluate import Score, describe, evaluate
    from sparsekv.provenance import environment

    points = _points(adapter, settings.ratios)
    loaded, tokenizer = open_model(model)
    attach_from_options(loaded, adapter=adapter, cr=None, policy=policy, budget=budget)

    def show(score: Score) -> None:
        typer.echo(describe(score), err=as_json)

    documents = load_documents([text])[1]
    others = other_documents(settings.other_texts, trained_on=[text])
    scores = evaluate(
        loaded, tokenizer, documents=documents, points=points, settings=settings, others=others, on_score=show
    )
    if as_json:
        values = [score.to_dict() for score in scores]
        about = {"model": model, "adapter": adapter, "text": text, "settings": asdict(settings)}
        typer.echo(json.dumps(about | environment(loaded.device) | {"scores": values}))
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


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError:
        raise ValueError(
            f"--{option} is {text!r}; write numbers of tokens with commas between, such as 1024,4096"
        ) from None
