"""What a scorer thinks of the chains drawn, in a file beside each cell's draws: made once, after the drawing, so that a
scorer that does not answer costs nothing that was drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekv.json_lines import Line, append, read_lines
from sparsekv.studies.runner import Say, to_stderr
from sparsekv.studies.scale.cells import Cell
from sparsekv.studies.scale.draws import Draws
from sparsekv.studies.scale.study import Study

FOLDER = "scores"


def score(study: Study, out: Path, *, say: Say = to_stderr) -> None:
    """Have every problem scored that is not, of the cells that have draws. Raises ScorerError, and what was scored is
    kept; ValueError for draws without texts."""
    if study.scorer is None:
        return
    scorer = study.make_scorer()
    for cell in study.cells():
        lines = Draws.of(out, cell).read()[1]
        done = {line["problem"] for line in _read(out, cell)}
        left = [line for line in lines if line["problem"] not in done]
        if left:
            say(f"== scores of {cell.name}: {len(left)} problems")
        for line in left:
            if "text" not in line:
                raise ValueError(f"{out} was drawn without a scorer, so without texts to score; give another --out")
            ended = [i for i, answer in enumerate(line["answer"]) if answer is not None]
            found = scorer.scores([(line["prompt"], line["text"][i]) for i in ended])
            values = [0.0] * len(line["answer"])
            for i, value in zip(ended, found, strict=True):
                values[i] = value
            append(_path(out, cell), [{"problem": line["problem"], "scores": values}])


def scores_of(study: Study, out: Path, cell: Cell, lines: Sequence[Line]) -> NDArray[np.float64] | None:
    """[P, n] of these problems; None where the study has no scorer. Raises ValueError where one has no scores yet."""
    if study.scorer is None:
        return None
    found = {line["problem"]: line["scores"] for line in _read(out, cell)}
    missing = [line["problem"] for line in lines if line["problem"] not in found]
    if missing:
        raise ValueError(f"{cell.name} has no scores of {missing[0]} yet; run the study with its scorer up")
    return np.array([found[line["problem"]] for line in lines])


def _read(out: Path, cell: Cell) -> list[Line]:
    path = _path(out, cell)
    return read_lines(path) if path.exists() else []


def _path(out: Path, cell: Cell) -> Path:
    return out / FOLDER / Draws.of(out, cell).path.name
