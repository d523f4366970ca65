"""What was aimed at: met with the margin and an interval that excludes zero, else missed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsekv.json_lines import read_lines
from sparsekv.markdown import table
from sparsekv.studies.scale.report.margins import ALL, VOTED, Compared
from sparsekv.studies.scale.report.sections import VERDICT, verdicts
from sparsekv.studies.scale.study import Study, load_study

ROOT = Path(__file__).parents[4]
AIMS = load_study(ROOT / "studies/reasoning.yaml").aim_list
ONE = Compared(
    method="dms", over="dense", task=ALL, budget="reads", axis="linear",
    margin=0.12, low=0.02, high=0.2, doublings=3, tasks=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "met"),
        ({"margin": 0.09}, "missed"),
        ({"low": -0.01}, "missed"),
        ({"margin": None, "low": None, "high": None}, "missed"),
    ],
)
def test_a_verdict(changes: dict[str, float | None], verdict: str) -> None:
    (row,) = verdicts(AIMS, [replace(ONE, **changes)])
    assert row[:4] == ["dms - dense", "KV reads", "tasks", "+10"]
    assert row[-1] == verdict


def test_each_aim_is_looked_up_where_its_methods_were_compared() -> None:
    every = [replace(ONE, method=a.method, over=a.over, budget=a.budget, task=t) for a in AIMS for t in (ALL, VOTED)]
    assert len(verdicts(AIMS, every)) == len(AIMS) + sum(aim.voted is not None for aim in AIMS)
    assert verdicts(AIMS, [replace(ONE, axis="log"), replace(ONE, over="tova"), replace(ONE, task="times-8")]) == []


def test_the_published_verdicts_are_those_of_the_results() -> None:
    lines = read_lines(ROOT / "benchmarks/results/hyperscaling/margins.jsonl")
    found = verdicts(AIMS, [Compared(**line) for line in lines])
    assert table(VERDICT, found) in (ROOT / "docs/hyperscaling.md").read_text()


@pytest.mark.parametrize(
    ("aims", "sentence"),
    [
        (
            [{"method": "dms", "over": "dense", "budget": "watts", "mean": 1}],
            "equal 'watts'; use one of reads",
        ),
        ([{"method": "dms", "over": "quest", "budget": "reads", "mean": 1}], "methods that it does not have: quest"),
        ([{"method": "dms"}], "give a list of mappings with the keys method, over, budget, mean"),
        (3, "the study's aims are 3; give a list"),
    ],
)
def test_an_aim_that_fits_nothing(aims: Any, sentence: str) -> None:
    grid = {"tasks": ["sums-1"], "widths": [1], "lengths": [8], "problems": 1, "adapter": "a"}
    with pytest.raises(ValueError, match=sentence):
        Study(model="m", policies={"dense": {}, "dms": {"ratios": [2]}}, aims=aims, **grid)
