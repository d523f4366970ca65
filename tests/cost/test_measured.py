"""Measured steps beside the prediction, from the committed results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsekv.cost import HARDWARE, against_measured, shape_of

RESULTS = Path(__file__).parents[2] / "benchmarks/results/h100.jsonl"


@pytest.fixture
def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def test_every_measured_step_takes_longer_than_its_floor(rows):
    found = against_measured(rows)
    assert len(found) == sum(row["bench"] == "step" for row in rows)
    assert all(1 < step.over < 3 for step in found)


def test_the_prediction_is_that_of_weights_and_live_bytes(rows):
    """The bench counts live bytes by the allocator, at the bandwidth of a copy: the same bytes, another speed."""
    for row, step in zip((r for r in rows if r["bench"] == "step"), against_measured(rows), strict=True):
        seconds = row["roofline_without_embedding_ms"] / 1e3
        assert step.predicted_ms * 3.35e9 == pytest.approx(seconds * row["copy_bytes_per_s"], rel=1e-3)


def test_only_the_model_and_the_device_asked_for(rows):
    qwen, h100 = shape_of("qwen3-8b"), HARDWARE["h100-sxm"]
    found = against_measured(rows, shape=replace(qwen, name="a folder"), hardware=h100)
    assert found and {step.shape for step in found} == {"qwen3-8b"}
    assert against_measured(rows, shape=shape_of("llama3.1-8b")) == []
    assert against_measured(rows, hardware=HARDWARE["h200"]) == []
    assert against_measured(rows, hardware=HARDWARE["cpu"]) == []
    own = replace(h100, name="own", bandwidth=h100.bandwidth / 2)
    slower = against_measured(rows, shape=qwen, hardware=own)
    assert [step.predicted_ms for step in slower] == pytest.approx([2 * step.predicted_ms for step in found])
