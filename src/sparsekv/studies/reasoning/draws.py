"""Chains that the plain model draws: a look at what it solves, and its own chains for the retrofit."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekv.engine import LLM, SamplingParams
from sparsekv.evals.problems.base import Problem, Task
from sparsekv.evals.problems.tasks import get, procedural
from sparsekv.json_lines import append
from sparsekv.provenance import environment
from sparsekv.studies.reasoning.chats import chat
from sparsekv.studies.reasoning.config import ReasoningConfig
from sparsekv.studies.runner import Say

FIRST_OWN = 10_000_000
"""The number of the first training problem that own chains are drawn for: none that is fine-tuned on."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How chains are drawn."""

    samples: int = 4
    tokens: int = 3072
    """Of a chain, at most."""
    temperature: float = 1.0
    rows: int = 512
    """Chains at once."""
    kv_memory: str | None = None
    seed: int = 0


def check(
    model: str,
    names: Sequence[str],
    out: Path,
    settings: DrawSettings,
    *,
    temperatures: Sequence[float],
    count: int,
    say: Say,
) -> None:
    """Append to OUT, for each temperature and task, what one chain and a vote or any of `samples` solve of `count`
    validation problems. Raises ValueError for an unknown task or model."""
    tasks = [get(name) for name in names]
    problems = [task.problems("validation", count) for task in tasks]
    llm = engine(model, settings)
    about = {"model": model, **environment(llm.model.device), "seed": settings.seed}
    for temperature in temperatures:
        started = time.monotonic()
        drawn = _draw(llm, [p for own in problems for p in own], replace(settings, temperature=temperature))
        seconds = time.monotonic() - started
        made = sum(len(o.token_ids) for output in drawn for o in output.outputs)
        say(f"{made} tokens in {seconds:.1f} s, {made / seconds:.0f} a second")
        for number, (task, own) in enumerate(zip(tasks, problems, strict=True)):
            found = drawn[number * count : (number + 1) * count]
            line = {"task": task.name, "temperature": temperature, **_solved(task, own, found), **about}
            append(out, [line])
            say(json.dumps(line))


def own(config: ReasoningConfig, model: str, out: Path, settings: DrawSettings, *, count: int, say: Say) -> None:
    """Write finished chains of the model as chats, for `count` training problems that it was not fine-tuned on,
    families and difficulties in turn. Raises ValueError where no chain came to its end."""
    levels = [(family.family, level) for family in config.families for level in family.levels]
    chosen = [levels[i % len(levels)] for i in range(count)]
    problems = [procedural(*pair).problem("train", FIRST_OWN + i) for i, pair in enumerate(chosen)]
    outputs = _draw(engine(model, settings), problems, settings)
    chats = [
        chat(problem.prompt, sample.text)
        for problem, output in zip(problems, outputs, strict=True)
        for sample in output.outputs
        if sample.finish_reason == "stop"
    ]
    if not chats:
        raise ValueError(f"no chain of {model} ended within {settings.tokens} tokens; allow more, or train it longer")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in chats), encoding="utf-8")
    say(f"{len(chats)} chains of {count * settings.samples} in {out}")


def engine(model: str, settings: DrawSettings) -> LLM:
    """The dense model, with room for the longest chain. Raises ValueError as LLM does."""
    return LLM(
        model,
        max_num_seqs=settings.rows,
        max_num_batched_tokens=max(8192, settings.rows),
        max_model_len=settings.tokens + 1024,
        kv_memory=settings.kv_memory,
    )


def _draw(llm: LLM, problems: Sequence[Problem], settings: DrawSettings) -> list[Any]:
    params = [
        SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.tokens,
            seed=settings.seed + number,
        )
        for number in range(len(problems))
    ]
    return llm.chat([[{"role": "user", "content": problem.prompt}] for problem in problems], params)


def _solved(task: Task, problems: Sequence[Problem], outputs: Sequence[Any]) -> dict[str, Any]:
    chains = right = ended = tokens = 0
    together = 0.0
    for problem, output in zip(problems, outputs, strict=True):
        answers = [task.extract(o.text) if o.finish_reason == "stop" else None for o in output.outputs]
        good = [a is not None and task.right(problem, a) for a in answers]
        together += _vote(answers, good) if task.voted else any(good)
        chains += len(answers)
        right += sum(good)
        ended += sum(o.finish_reason == "stop" for o in output.outputs)
        tokens += sum(len(o.token_ids) for o in output.outputs)
    return {
        "problems": len(problems),
        "samples": chains // len(problems),
        "right": round(right / chains, 4),
        "together": round(together / len(problems), 4),
        "ended": round(ended / chains, 4),
        "tokens": round(tokens / chains, 1),
    }


def _vote(answers: list[str | None], good: list[bool]) -> float:
    """The chance that a majority vote, ties broken at random, is right."""
    counts = Counter(a for a in answers if a is not None)
    top = [a for a, n in counts.items() if n == max(counts.values())]
    return sum(good[answers.index(a)] for a in top) / len(top) if top else 0.0
