"""bench train --processes: what is measured, what is said of a model that does not fit, a failure that is a line."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from distributing import fork
from sparsekv.bench.shapes import shape_of
from sparsekv.bench.training import together, together_process
from sparsekv.bench.training.train import step_flops
from sparsekv.cli.bench.command import app

SPEC = {"shape": "tiny", "way": "alone", "trainable": "all", "processes": 1, "tokens": 160, "seed": 0}
SPEC |= {"rows": 1, "batch": 1}


def measured(folder, **changes):
    assert together_process.main([json.dumps(SPEC | {"folder": str(folder)} | changes)]) == 0
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


def test_one_process_times_the_step_of_all_weights(tmp_path):
    (line,) = measured(tmp_path)
    assert line["layers"] == 2
    assert line["ms"] > 0 and line["commit"] is not None
    flops = step_flops(shape_of("tiny"), batch=1, tokens=160, trained=True)
    assert line["tflops"] == pytest.approx(flops / line["ms"] / 1e9)


def test_what_does_not_fit_is_said_and_timed_at_two_depths(tmp_path, monkeypatch):
    def timed(shape, *args, **kwargs):
        if shape.layers == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return {"ms": 10.0 + 3 * shape.layers, "peak_bytes": 7}

    monkeypatch.setattr(together_process, "timed_step", timed)
    whole, few, many, line = measured(tmp_path)
    assert whole["error"] == "does not fit: CUDA out of memory"
    assert (few["layers"], many["layers"]) == (4, 8)
    assert (line["layers"], line["extrapolated_from"], line["peak_bytes"]) == (2, [4, 8], None)
    assert line["ms"] == pytest.approx(16)


def test_training_the_weights_costs_their_gradient_and_nothing_else():
    shape = replace(shape_of("tiny"), layers=1)
    frozen, trained = (step_flops(shape, batch=2, tokens=10, trained=t) for t in (False, True))
    assert trained - frozen == 2 * 20 * (shape.layer_weights + shape.vocabulary * shape.hidden)


def test_a_measurement_that_fails_is_a_line_and_the_next_goes_on(monkeypatch):
    def start(command, log, **kwargs):
        log.write_text("RuntimeError: NCCL error\n")
        if '"all"' in command[-1]:
            raise TimeoutError("not done after 200 s")
        return 1

    monkeypatch.setattr(together, "start", start)
    lines = []
    together.bench_together(shape_of("tiny"), processes=2, batch=1, tokens=160, seed=0, keep=lines.append, commit="abc")
    made = {(line["way"], line["trainable"]): line["error"] for line in lines}
    assert made == {
        ("alone", "heads"): "exit code 1: RuntimeError: NCCL error",
        ("alone", "all"): "not done after 200 s: RuntimeError: NCCL error",
        ("halves", "heads"): "exit code 1: RuntimeError: NCCL error",
    }
    assert all(line["commit"] == "abc" for line in lines)


@pytest.mark.slow
def test_the_command_times_two_halves_of_a_model(monkeypatch):
    """In this process, and in two that are forked; test_launch.py has the commands, and the studies start them."""

    def start(command, log, **kwargs):
        count = 2 if "torch.distributed.run" in command else 1
        assert command[-3:-1] == ["-m", together.MODULE]
        if count == 1:
            return together_process.main(command[-1:])
        return fork(count, together_process.main, [command[-1:]], log)

    monkeypatch.setattr(together, "start", start)
    monkeypatch.setattr(together, "FIRST", [("alone", "heads")])
    done = CliRunner().invoke(app, ["train", "--shape", "tiny", "--processes", "2", "--tokens", "160", "--json"])
    assert done.exit_code == 0, done.output
    alone, halves = (json.loads(line) for line in done.stdout.splitlines())
    assert (alone["way"], alone["processes"]) == ("alone", 1)
    assert (halves["way"], halves["processes"], halves["rows"]) == ("halves", 2, 1)
    assert alone["ms"] > 0 and halves["ms"] > 0
