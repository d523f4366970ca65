"""`sparsekv demo`: the embedded model on a CPU, dense, with trained heads at ratios 2, 4 and 8, and with two methods
that need no training. Every number is measured in the run."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from sparsekv.cli.config import save_resolved
from sparsekv.cli.models import find_adapter, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.cli.demo.task import Task

MODEL = "smollm2-135m"
METHODS = (("dense", 1.0), ("dms", 2.0), ("dms", 4.0), ("random", 4.0), ("streaming", 4.0), ("dms", 8.0))
"""Policies and ratios; dense comes first."""
PAGE_RATIO = 4.0
"""The ratio of the page that shows what was forgotten."""
CONTEXT, CONTINUATION, GENERATE = 2048, 256, 96
STUDY = "studies/reasoning.yaml"
README_PICTURE = "docs/img/demo.png"
"""Where the README's picture lies, from the README's folder."""


def command(
    ctx: typer.Context,
    out: Annotated[Path, Option(help="Folder for results.json, the picture and the page.")] = Path("demo"),
    adapter: Annotated[str | None, Option(help="Trained eviction heads; default: the repository's.")] = None,
    seed: Annotated[int, Option(help="Picks the article and the fact.")] = 0,
    readme: Annotated[Path | None, Option(help="Rewrite the demo's block of this README, and its picture.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print results.json instead of the table.")] = False,
) -> None:
    """What compression costs and saves: a small model reads, answers and continues, dense and at ratios 2, 4 and 8,
    beside random eviction and StreamingLLM."""
    from rich.console import Console

    from sparsekv.assets.texts import fetch_text, split
    from sparsekv.cli.demo.report import draw, readme_block, rewrite_readme, table
    from sparsekv.cli.demo.task import make_task
    from sparsekv.cli.inspect.page import build_page

    notes = Console(stderr=True)
    adapter = adapter or find_adapter(MODEL)
    model, tokenizer = open_model(MODEL)
    held_out = split(fetch_text("encyclopedia"))[1]
    task = make_task(tokenizer, held_out, seed=seed, context=CONTEXT, continuation=CONTINUATION)
    notes.print(f'Hidden in "{task.title}": {task.fact} Asked: {task.question}', highlight=False)
    results = measure(
        model, tokenizer, task, adapter=adapter, seed=seed, notes=notes, methods=METHODS, generate=GENERATE
    )
    page = build_page(_inspected(model, tokenizer, task, adapter))

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(results, out / "cache.png")
    (out / "inspect.html").write_text(page, encoding="utf-8")
    save_resolved(ctx, out)
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False))
    else:
        Console().print(table(results))
    notes.print(f"wrote results.json, cache.png and inspect.html to {out}", highlight=False)
    notes.print(f"repeat the study of longer thinking: sparsekv scale {STUDY}", highlight=False)
    notes.print(f"serve it: sparsekv serve {MODEL} --adapter {adapter} --cr 4", highlight=False, soft_wrap=True)
    if readme is not None:
        picture = readme.parent / README_PICTURE
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "cache.png", picture)
        rewrite_readme(readme, readme_block(results, README_PICTURE))


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    *,
    adapter: str,
    seed: int,
    notes: Any,
    methods: Sequence[tuple[str, float]],
    generate: int,
) -> dict[str, Any]:
    """The results, JSON-ready: one run of an unattached model for each policy and ratio."""
    import torch

    from sparsekv.cli.demo.run import run_task, warm_up
    from sparsekv.evals.methods.setting import Setting
    from sparsekv.modeling.attach import attach, detach
    from sparsekv.policies.registry import describe
    from sparsekv.provenance import environment

    runs = []
    tokens = sum(part.shape[1] for part in (task.context, task.continuation, task.ask)) + generate
    for policy, ratio in methods:
        setting = Setting(
            policy=policy,
            adapter=adapter if describe(policy).needs_training else None,
            cr=None if policy == "dense" else ratio,
        )
        attach(model, **setting.arguments(tokens=tokens))
        if not runs:
            warm_up(model, task)
        with notes.status("dense" if policy == "dense" else f"{policy} at {ratio:g}"):
            runs.append(asdict(run_task(model, tokenizer, task, ratio=ratio, generate=generate)))
        detach(model)
    return {
        "model": MODEL,
        "adapter": adapter,
        "seed": seed,
        "task": {
            "article": task.title,
            "fact": task.fact,
            "question": task.question,
            "expected": task.answer,
            "context": task.context.shape[1],
            "continuation": task.continuation.shape[1],
            "generate": generate,
        },
        "runs": runs,
        "environment": environment(torch.device(model.device)),
    }


def _inspected(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: "Task", adapter: str) -> Any:
    """The context as `inspect` sees it."""
    from sparsekv.cli.inspect.command import inspect_text
    from sparsekv.modeling.attach import attach, detach

    attach(model, adapter=adapter, cr=PAGE_RATIO)
    text = str(tokenizer.decode(task.context[0], skip_special_tokens=True))
    try:
        return inspect_text(model, tokenizer, text, title=task.title, model_name=MODEL, method=adapter, cr=PAGE_RATIO)
    finally:
        detach(model)
