"""Make the runs of a study one after the other and measure each alike: one JSON line a run and point.

A point is either a ratio that an offset was dialled to, for each text by itself, or `end`: the heads as training left
them. A run's lines are written when it is complete; what the file holds is not made again, and a run that was stopped
goes on from its last checkpoint.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsekv.evals.corpus import other_documents
from sparsekv.evals.evaluate import Point, describe, evaluate
from sparsekv.json_lines import append, read_lines
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.attach import heads
from sparsekv.retrofit import run as retrofit
from sparsekv.retrofit.data.config import texts_of
from sparsekv.retrofit.data.documents import held_out, read_all
from sparsekv.retrofit.training.metrics import METRICS_FILE
from sparsekv.studies.ablations.controls import CONTROLS
from sparsekv.studies.ablations.study import BASE, Run, Study
from sparsekv.studies.runner import Say, missing, to_stderr

RESULTS = "ablations.jsonl"


def perform(
    study: Study,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    seconds: float = float("inf"),
    run_seconds: float = float("inf"),
    say: Say = to_stderr,
) -> None:
    """Make the runs (those named in `only`, and the base where a control needs it) that out/ablations.jsonl lacks.

    seconds: no further run is begun after this time. run_seconds: a run is left out where the steps so far say that its
    training would take longer. Raises ValueError for unknown names and what a retrofit cannot do.
    """
    results = out / RESULTS
    for name in missing(list(study.runs), results, key="run", only=only, seconds=seconds, say=say):
        run, lines = study.runs[name], read_lines(results) if results.exists() else []
        expected = run.config.steps * max((line["seconds_per_step"] for line in lines), default=0.0)
        if run.trained and expected > run_seconds:
            say(f"{name} is left out: it would train for some {expected:.0f} seconds")
            continue
        say(f"== {name}")
        append(results, _lines(run, study.runs[BASE], out, say))


def _lines(run: Run, base: Run, out: Path, say: Say) -> list[dict[str, Any]]:
    made = run if run.trained else base
    config = replace(made.config, output=str(out / made.folder), evaluation=None)
    folder = Path(config.output)
    started = time.monotonic()
    if not (folder / retrofit.CARD_FILE).exists():
        retrofit.run(config, say=say)
    trained = time.monotonic() - started
    scores, about = _measure(run, base, folder, say)
    lines = read_lines(folder / METRICS_FILE)
    _free()
    shared = {
        "run": run.name,
        "changes": run.changes,
        "config": run.config.training_keys(),
        "seed": run.config.seed,
        "steps": config.steps if run.checkpoint is None else config.steps_to(run.checkpoint),
        "seconds_per_step": round(statistics.median(line["seconds"] for line in lines), 4),
        "seconds": round(trained, 1),
        "date": time.strftime("%Y-%m-%d"),
        **about,
    }
    return [shared | {"point": "end" if score["asked"] is None else "dialled", **score} for score in scores]


def _measure(run: Run, base: Run, folder: Path, say: Say) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(scores, dialled and undialled; where they come from). A checkpoint is measured as it was saved. The text is what
    the base's data hold out, and other texts, or of those that the run trained on, what they hold out."""
    config, settings = run.config, run.config.evaluation
    assert settings is not None
    reach = read_adapter(folder)[0].max_cr * 1.05
    points = [Point(asked=ratio, offset=0.0) for ratio in settings.ratios if ratio <= reach]
    if run.checkpoint is not None:
        folder, points = folder / f"cr{run.checkpoint:g}", []
    model, tokenizer = retrofit.load_result(replace(config, output=str(folder)))
    if run.control is not None:
        CONTROLS[run.control](heads(model), seed=config.seed)
    scores = evaluate(
        model,
        tokenizer,
        documents=held_out(read_all(base.config.data, tokenizer, model=config.model, seed=config.seed)),
        points=[*points, Point(offset=0.0)],
        settings=replace(settings, same_ratio=True),
        others=other_documents(settings.other_texts, trained_on=texts_of(config.data)),
        reference=retrofit.load_reference(config),
        on_score=lambda score: say("  " + describe(score)),
    )
    return [score.to_dict() for score in scores], retrofit.provenance(model, config)


def _free() -> None:
    """Nothing of one run stays on the device, nor its compiled layers, when the next begins."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
