"""bench train: what is counted, what is extrapolated, and that a step is the retrofit's."""

from dataclasses import replace

import pytest
import torch

from sparsekv.bench.shapes import shape_of
from sparsekv.bench.training import train

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_a_large_model_is_a_line_through_two_depths(monkeypatch):
    shape = shape_of("qwen3-8b")
    monkeypatch.setattr(train, "_timed_step", lambda shape, *args, **kwargs: {"ms": 10.0 + 3 * shape.layers})
    found = train.bench_step(shape, batch=1, tokens=8192, **CPU)
    assert found["ms"] == pytest.approx(10 + 3 * shape.layers)
    assert found["extrapolated_from_layers"] == [4, 8]
    assert [t["layers"] for t in found["timed"]] == [4, 8]


def test_a_small_model_is_timed_whole(monkeypatch):
    monkeypatch.setattr(train, "_timed_step", lambda shape, *args, **kwargs: {"ms": 2.0})
    found = train.bench_step(shape_of("smollm2-135m"), batch=16, tokens=2048, **CPU)
    assert (found["ms"], found["extrapolated_from_layers"]) == (2.0, None)
    assert found["tokens_per_s"] == pytest.approx(16 * 2048 / 2e-3)


def test_operations_of_a_step_by_hand(monkeypatch):
    """One layer, 2 x 10 tokens: matrices thrice, attention nine products, the output head thrice."""
    shape = replace(shape_of("tiny"), layers=1)
    monkeypatch.setattr(train, "_timed_step", lambda *args, **kwargs: {"ms": 1.0})
    matrices = 2 * 64 * 4 * 64 + 2 * 64 * 2 * 64 + 3 * 64 * 128  # q, o; k, v; gate, up, down
    product = 2 * 4 * 64 * 10 * 10
    expected = 6 * 20 * matrices + 9 * product + 6 * 20 * 256 * 64
    assert train.bench_step(shape, batch=2, tokens=10, **CPU)["tflops"] == pytest.approx(expected / 1e9)
