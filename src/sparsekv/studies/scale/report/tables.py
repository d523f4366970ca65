"""What the draws of a study amount to: for each method, ratio and task, accuracy and budgets by problem, W and L.

W chains cost W times one chain in the mean: reads, peak tokens and bytes (each chain's own, the prompt counted with
each), seconds and tokens. A chain longer than L has no answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv.evals.methods.intervals import Estimate, share
from sparsekv.json_lines import Line
from sparsekv.scaling import subsets
from sparsekv.studies.scale.cells import Cell
from sparsekv.studies.scale.draws import Draws
from sparsekv.studies.scale.report.scores import scores_of
from sparsekv.studies.scale.study import Study

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One method at one ratio on one task, over its seeds; P problems."""

    cell: Cell
    """That of the first seed."""
    voted: bool
    problems: list[str]
    accuracy: Floats
    """[P, W, L]"""
    costs: dict[str, Floats]
    """By budget: [P, W, L]."""
    chains: "Chains"
    about: Line = field(repr=False)
    """What it was drawn with and where."""

    def estimate(self, w: int, l: int) -> Estimate:  # noqa: E741 - W and L are the field's names
        """Of widths[w] and lengths[l], over problems."""
        found = share(self.accuracy[:, w, l], unit="problems")
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class Chains:
    """What single chains are like, at the largest L."""

    tokens: float
    ended: float
    """The share that ended by themselves."""
    ratio: float
    """Tokens seen over tokens held, at the end."""
    bounds: float
    """Pages whose bounds were read."""


def tables(study: Study, out: Path) -> list[Table]:
    """Of every method, ratio and task that has draws, in the study's order."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells():
        groups.setdefault((cell.key, cell.task), []).append(cell)
    return [table for cells in groups.values() if (table := _table(study, out, cells)) is not None]


def _table(study: Study, out: Path, cells: Sequence[Cell]) -> Table | None:
    """Problems that every seed with draws has."""
    found = [(cell, *Draws.of(out, cell).read()) for cell in cells]
    found = [(cell, header, lines) for cell, header, lines in found if header is not None and lines]
    if not found:
        return None
    header = found[0][1]
    named = [{line["problem"]: line for line in lines} for _, _, lines in found]
    problems = [name for name in named[0] if all(name in other for other in named)][: study.problems]
    if not problems:
        return None
    seeds = [[own[name] for name in problems] for own in named]
    scores = [scores_of(study, out, cell, own) for (cell, _, _), own in zip(found, seeds, strict=True)]
    accuracy = np.mean([_accuracy(study, header, own, s) for own, s in zip(seeds, scores, strict=True)], axis=0)
    cuts = [header["lengths"].index(length) for length in sorted(study.lengths)]
    each = {
        name: np.mean([_mean(own, name)[:, cuts] for own in seeds], axis=0) for name in ("reads", "peak", "seconds")
    }
    each["tokens"] = np.mean([_tokens(own, sorted(study.lengths)) for own in seeds], axis=0)
    widths = np.array(sorted(study.widths), dtype=np.float64)[None, :, None]
    costs = {
        "reads": each["reads"],
        "peak_tokens": each["peak"],
        "peak_bytes": each["peak"] * header["bytes_per_token"],
        "seconds": each["seconds"],
        "tokens": each["tokens"],
    }
    commits = dict.fromkeys(line["commit"] or "unknown" for own in seeds for line in own)
    return Table(
        cell=cells[0],
        voted=header["voted"],
        problems=problems,
        accuracy=accuracy,
        costs={name: value[:, None, :] * widths for name, value in costs.items()},
        chains=_chains([line for own in seeds for line in own]),
        about=header | {"commit": ", ".join(commits)},
    )


def _accuracy(study: Study, header: Line, lines: Sequence[Line], scores: Floats | None) -> Floats:
    """[P, W, L]: the mean over subsets of W chains."""
    tokens, right = np.array([line["tokens"] for line in lines]), np.array([line["right"] for line in lines])
    answers = np.array([_numbered(line["answer"]) for line in lines])
    out = np.zeros((len(lines), len(study.widths), len(study.lengths)))
    for li, length in enumerate(sorted(study.lengths)):
        standing = tokens <= length
        now, good = np.where(standing, answers, -1), standing & right
        for wi, width in enumerate(sorted(study.widths)):
            if study.rule == "best" and scores is not None:
                out[:, wi, li] = subsets.best(scores, now, good, width)
            elif not header["voted"]:
                out[:, wi, li] = subsets.passes(good, width)
            else:
                out[:, wi, li] = subsets.votes(now, good, width, scores)
    return out


def _numbered(answers: Sequence[str | None]) -> list[int]:
    names = {answer: i for i, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    return [-1 if answer is None else names[answer] for answer in answers]


def _mean(lines: Sequence[Line], name: str) -> Floats:
    """[P, lengths]: over chains."""
    return np.array([line[name] for line in lines], dtype=np.float64).mean(1)


def _tokens(lines: Sequence[Line], lengths: Sequence[int]) -> Floats:
    tokens = np.array([line["tokens"] for line in lines], dtype=np.float64)
    return np.minimum(tokens[:, :, None], np.array(lengths, dtype=np.float64)).mean(1)


def _chains(lines: Sequence[Line]) -> Chains:
    def flat(name: str) -> Any:
        return np.concatenate([line[name] for line in lines])

    return Chains(
        tokens=float(flat("tokens").mean()),
        ended=float(flat("ended").mean()),
        ratio=float(flat("seen").sum() / max(flat("held").sum(), 1e-9)),
        bounds=float(flat("bounds")[:, -1].mean()),
    )


def result_lines(study: Study, made: Sequence[Table]) -> list[Line]:
    """results.jsonl: a line for each method, ratio, task, W and L."""
    keep = ("method", "policy", "adapter", "model", "ratio", "task", "voted", "temperature", "split")
    machine = ("commit", "hardware", "threads", "python", "sparsekv", "torch", "transformers", "kv_memory", "rows")
    lines = []
    for table in made:
        for wi, width in enumerate(sorted(study.widths)):
            for li, length in enumerate(sorted(study.lengths)):
                estimate = table.estimate(wi, li)
                lines.append(
                    {name: table.about[name] for name in keep}
                    | {"seeds": study.seeds, "width": width, "length": length, "problems": len(table.problems)}
                    | {"accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
                    | {name: float(f"{cost[:, wi, li].mean():.6g}") for name, cost in table.costs.items()}
                    | {name: table.about[name] for name in machine}
                )
    return lines
