"""`sparsekv eval`: what a method costs, each score beside the ratio, bytes and reads that were measured with it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.models import open_model, setting_of
from sparsekv.evals.settings import MeasurementConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.evals.methods.rows import Row
    from sparsekv.evals.methods.setting import Setting

PERPLEXITY = "perplexity"
KINDS = {
    "passkey": "pass key",
    "unseen": "unseen",
    "look-up": "look-up",
    "multi-needle": "multi-needle",
    "variable-tracking": "variable tracking",
    "new-relations": "new relations",
    "new-forms": "new forms",
    "rivals": "rivals",
    "two-hops": "two hops",
}
"""Task -> kind of retrieval."""


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    policy: Annotated[str | None, Option(help="The method; see `sparsekv policies`. Default: dense, or dms.")] = None,
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    cr: Annotated[
        list[float] | None,
        Option(help="Compression ratio: of the adapter, or budget = (prompt + output tokens) / cr. Repeatable."),
    ] = None,
    budget: Annotated[int | None, Option(help="Tokens that the policy may hold per head, or Quest read.")] = None,
    option: Annotated[list[str] | None, Option(help="Another of the policy's, such as sinks=8. Repeatable.")] = None,
    tasks: Annotated[
        str,
        Option(
            help="perplexity, passkey, unseen, look-up, multi-needle, variable-tracking, new-relations, new-forms, "
            "rivals, two-hops; lm-evaluation-harness's by name, or a YAML file."
        ),
    ] = "perplexity,passkey,unseen",
    text: Annotated[
        str, Option(help="encyclopedia, handbook, bible, a text file, or a folder of .txt files.")
    ] = "encyclopedia",
    rows: Annotated[int, Option(help="Held-out texts for perplexity and divergence.")] = 2,
    length: Annotated[int, Option(help="Tokens of each; the second half is scored.")] = 2048,
    other_texts: Annotated[str, Option(help="Texts of other domains, such as handbook,bible.")] = "",
    long_lengths: Annotated[str, Option(help="Further lengths of held-out text, such as 4096,8192.")] = "",
    same_ratio: Annotated[
        bool, Option(help="Dial an adapter to the ratio on each text, instead of one offset for all.")
    ] = False,
    by: Annotated[str, Option(help="Text scored by steps, one prefill, or auto: steps where needed.")] = "auto",
    items: Annotated[int, Option(help="Retrieval items of each task and context.")] = 4,
    contexts: Annotated[str, Option(help="Tokens of the retrieval items, with commas between.")] = "1024,2048",
    answers: Annotated[str, Option(help="Retrieval's answers: forced, or generated.")] = "forced",
    limit: Annotated[int | None, Option(help="Documents of each lm-evaluation-harness task.")] = None,
    batch: Annotated[int, Option(help="Sequences at once.")] = 1,
    seconds: Annotated[float, Option(help="No further setting is begun after this time.")] = 3600.0,
    seed: Annotated[int, Option(help="Of the retrieval items and of policies that draw.")] = 0,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Measure what a method costs, beside the dense model in the same run, through the real cache."""
    names = _names(tasks)
    if not names:
        raise ValueError(f"--tasks is empty; name some of {', '.join([PERPLEXITY, *KINDS])}, or a harness task")
    config = MeasurementConfig(
        text=PERPLEXITY in names,
        kinds=[KINDS[name] for name in names if name in KINDS],
        rows=rows,
        length=length,
        long_lengths=_numbers("long-lengths", long_lengths),
        same_ratio=same_ratio,
        by=by,
        items=items,
        contexts=_numbers("contexts", contexts),
        answers=answers,
        batch=batch,
        seconds=seconds,
        seed=seed,
    )
    settings = [
        setting_of(adapter=adapter, policy=policy, cr=ratio, budget=budget, options=option, seed=seed)
        for ratio in cr or [None]
    ]
    harness = [name for name in names if name not in (PERPLEXITY, *KINDS)]
    _check_harness(harness)
    loaded, tokenizer = open_model(model, dtype=dtype)
    settings[0].attach(loaded)
    settings = [setting for setting in settings if setting.policy != "dense"]  # which is measured anyway
    found: list[Row] = []

    def show(row: "Row") -> None:
        from sparsekv.evals.methods.rows import describe

        found.append(row)
        typer.echo(describe(row), err=as_json)

    if config.text or config.kinds:
        _measure_ours(loaded, tokenizer, settings, text=text, others=_names(other_texts), config=config, show=show)
    if harness:
        from sparsekv.evals.harness import measure_tasks

        measure_tasks(loaded, tokenizer, settings, tasks=harness, limit=limit, batch=batch, seed=seed, on_row=show)
    if as_json:
        from sparsekv.provenance import environment

        about = {"model": model, "adapter": adapter, "policy": policy, "text": text, "settings": asdict(config)}
        typer.echo(json.dumps(about | environment(loaded.device) | {"rows": [row.to_dict() for row in found]}))


def _check_harness(tasks: list[str]) -> None:
    """Raises ValueError for tasks that are neither ours nor lm-evaluation-harness's."""
    if not tasks:
        return
    try:
        from sparsekv.evals.harness import load_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError(
            f"--tasks {', '.join(tasks)}: these are not {', '.join([PERPLEXITY, *KINDS])}; for lm-evaluation-harness's "
            "run pip install 'sparsekv[eval]'"
        ) from None
    load_tasks(tasks)


def _measure_ours(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: list["Setting"],
    *,
    text: str,
    others: list[str],
    config: MeasurementConfig,
    show: Any,
) -> None:
    from sparsekv.evals.corpus import load_documents, other_documents
    from sparsekv.evals.methods.measure import measure

    documents = load_documents([text])[1]
    texts = other_documents(others, trained_on=[text])
    rows = measure(model, tokenizer, settings, documents=documents, others=texts, config=config, on_row=show)
    left = len(settings) + 1 - len(rows) // sum(row.policy == "dense" for row in rows)
    if left:
        typer.echo(f"{left} settings were left out: the {config.seconds:g} seconds were over", err=True)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError:
        raise ValueError(
            f"--{option} is {text!r}; write numbers of tokens with commas between, such as 1024,4096"
        ) from None
