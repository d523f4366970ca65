"""`sparsekv convert`, as a user types it."""

import json

import pytest
from safetensors.torch import save_file
from typer import Typer
from typer.testing import CliRunner

from helpers import tiny_model
from sparsekv.cli.convert import command
from sparsekv.modeling.adapter import read_adapter


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_model("Qwen3")
    folder = tmp_path / "dms"
    model.config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "dms_window_size": 512, "dms_cr": 8}))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def run(*arguments):
    app = Typer(add_completion=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_says_what_it_found(checkpoint, tmp_path):
    done = run("nvidia", checkpoint, tmp_path / "adapter")
    assert done.exit_code == 0
    assert "neuron source, window 513, lag 1, trained to 8x" in done.stdout and str(checkpoint) in done.stdout
    assert read_adapter(tmp_path / "adapter")[0].window == 513


def test_json(checkpoint, tmp_path):
    done = run("fastdms", checkpoint, tmp_path / "adapter", "--json")
    printed = json.loads(done.stdout)
    assert printed["neuron"] == {"channel": -1, "scale": 100.0, "offset": -5.0, "rezero": False}
    assert printed == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def test_mistakes_are_value_errors_and_write_nothing(checkpoint, tmp_path):
    done = run("nvidia", checkpoint, tmp_path / "adapter", "--base", checkpoint)
    assert isinstance(done.exception, ValueError) and "leave out base" in str(done.exception)
    assert not (tmp_path / "adapter").exists()
