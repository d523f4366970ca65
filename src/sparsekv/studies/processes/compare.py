"""How far a run's losses are from those of one process, and how far rounding alone can take them.

    worst = max over steps |loss - loss of one process|
    bound = TIMES * the largest worst of the runs that differ from one process in rounding alone

The noise is one draw of a few, and so is what it is compared with: that is what TIMES allows for. It tells a mistake
from noise as long as it is far below what other rows would do, which `scale` says: the median change of the loss from a
step to the next.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sparsekv.bench.timing import median
from sparsekv.studies.processes.runs import RUNS

Line = dict[str, Any]
TIMES = 3
SAME = 1e-7
"""The last bits of a float32 loss."""


def worst(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference at a step. Raises ValueError for runs of different lengths."""
    if len(losses) != len(others):
        raise ValueError(f"{len(losses)} steps beside {len(others)}")
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def compared(name: str, losses: Sequence[float], lines: Sequence[Line]) -> Line:
    """Of one run: worst, rounding (the noise), bound and whether it is within, and the scale; lines: of the others so
    far, whole or failed. What these lack is None, and empty for a run that others are compared with."""
    like = RUNS[name].like
    if like is None:
        return {}
    made = {line["run"]: line["losses"] for line in lines if "error" not in line}
    if like not in made:
        return {"worst": None, "rounding": None, "bound": None, "within": None, "scale": None}
    one, far = made[like], worst(losses, made[like])
    scale = median([abs(b - a) for a, b in pairwise(one)])
    if RUNS[name].noise:
        return {"worst": far, "scale": scale}
    noises = [worst(made[n], one) for n, run in RUNS.items() if run.noise and run.like == like and n in made]
    noise = max(noises, default=None)
    bound = None if noise is None else TIMES * noise
    return {
        "worst": far,
        "rounding": noise,
        "bound": bound,
        "within": None if bound is None else far <= bound,
        "scale": scale,
    }


def same_steps(losses: Sequence[float], others: Sequence[float]) -> int:
    """How many steps, from the first on, have the same loss within SAME."""
    return next((i for i, (a, b) in enumerate(zip(losses, others, strict=True)) if abs(a - b) > SAME), len(losses))
