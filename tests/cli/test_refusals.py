"""What the system refuses, and what is damaged: one sentence, exit code 2, and nothing half-written."""

import os
import shutil
import subprocess
import sys

import pytest

from commands import refused, save_model
from sparsekv.modeling.load import load_model, load_tokenizer

FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("left", [0, 5, 4000])
def test_damaged_weights(run, tmp_path, left):
    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    refused(
        run("generate", folder, "--prompt", "x"), f"cannot load {folder}: its weights are damaged", "fetch it again"
    )


def test_damaged_weights_in_our_own_folder(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = tmp_path / "sparsekv" / "models" / "smollm2-135m"
    shutil.copytree(model_folder, ours)
    (ours / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"its weights are damaged .*; delete the folder {ours}, and it is fetched"):
        load_model("smollm2-135m")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_full_disk_while_fetching(load, tmp_path, monkeypatch):
    def full(name):
        raise FULL

    monkeypatch.setattr("sparsekv.modeling.load.resolve_model", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"cannot keep smollm2-135m in {tmp_path}.*No space left on device.*make room"):
        load("smollm2-135m")


def test_a_page_that_could_not_be_written_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekv.cli.inspect.command.open_model", lambda name: pytest.fail("the work began"))
    text = tmp_path / "text.txt"
    text.write_text("The old lighthouse")
    words = ["inspect", "model", "--adapter", "a", "--file", text, "--html"]
    refused(run(*words, tmp_path / "nowhere" / "page.html"), f"there is no folder {tmp_path / 'nowhere'}")
    refused(run(*words, tmp_path), f"{tmp_path} is a folder; name a file in it")


def test_a_full_disk_in_inspect_keeps_the_old_page(run, model_folder, adapter_folder, tmp_path, monkeypatch):
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("The old lighthouse")
    page.write_text("old")

    def full(path, *args, **kwargs):
        path.touch()
        raise FULL

    monkeypatch.setattr("pathlib.Path.write_text", full)
    outcome = run("inspect", model_folder, "--adapter", adapter_folder, "--file", text, "--html", page)
    refused(outcome, f"cannot write {page}: No space left on device; make room there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "text.txt"]
    assert page.read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_an_output_that_takes_nothing():
    words = ["plan", "smollm2-135m", "--gpu", "h100-sxm", "--batch", "1", "--context", "1024"]
    code = f"import sys; sys.argv = ['sparsekv', *{words!r}]; from sparsekv.cli.main import main; main()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "Error: cannot write the output: No space left on device\n")


def test_a_prompt_that_is_not_utf8(run, model_folder):
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python passes it on
    refused(run("generate", model_folder, "--prompt", prompt), "prompt is not UTF-8")
