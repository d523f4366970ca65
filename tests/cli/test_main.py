"""The command line itself: lazy, and every mistake of the user is one sentence and exit code 2."""

import json
import shutil
import subprocess
import sys

import pytest

from commands import refused, save_model, write_adapter
from sparsekv import __version__


def test_help_loads_no_framework():
    code = (
        "import sys; sys.argv = ['sparsekv', '--help']\n"
        "from sparsekv.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print('LOADED', sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = out[out.index("LOADED") :]
    assert "demo" in out
    assert "'sparsekv'" in loaded
    for heavy in ("'torch'", "'transformers'", "'numpy'", "'matplotlib'"):
        assert heavy not in loaded


@pytest.mark.parametrize("name", ["demo", "generate", "eval", "policies", "inspect", "bench"])
def test_each_command_explains_itself(run, name):
    assert name in run("--help").out
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert f"sparsekv {name}" in outcome.out


def test_as_a_module():
    found = subprocess.run([sys.executable, "-m", "sparsekv", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == __version__


def test_version(run):
    assert run("--version").out.strip() == __version__


@pytest.mark.parametrize("words", [["nope"], ["generate"], ["generate", "model", "--prompt", "x", "--nope", "3"]])
def test_misuse_exits_with_2(run, words):
    outcome = run(*words)
    assert outcome.code == 2
    assert outcome.err


def test_an_interrupt_exits_with_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekv.cli.generate.open_model", interrupted)
    assert run("generate", "model", "--prompt", "x").code == 130


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "dms"], ["needs trained eviction heads", "--adapter"]),
        (["--policy", "tova"], ["--budget N or --cr R"]),
        (["--policy", "tova", "--budget", 0], ["budget is 0"]),
        (["--policy", "tova", "--budget", 300], ["context is 256"]),
        (["--policy", "tova", "--budget", 64, "--option", "sinks=2"], ["sinks", "budget, cr"]),
        (["--policy", "dense", "--cr", 4], ["no budget"]),
        (["--policy", "streaming", "--budget", 3], ["budget 3", "at least 5"]),
        (["--policy", "nope"], ["'nope'", "dense"]),
        (["--cr", 4], ["--adapter"]),
        (["--max-tokens", 0], ["max-tokens is 0"]),
        (["--temperature", -1], ["temperature is -1"]),
        (["--top-p", 0], ["top-p is 0"]),
        (["-n", 0], ["n is 0"]),
        (["-n", 3], ["--temperature"]),
        (["--max-tokens", 250], ["context of 256", "shorten"]),
        (["--chat"], ["--raw"]),
        (["--dtype", "float17"], ["float17"]),
        (["--kv-memory", "lots"], ["lots", "512MiB"]),
        (["--kv-memory", "1KiB"], ["raise it"]),
    ],
)
def test_bad_options_are_one_sentence(run, model_folder, options, words):
    refused(run("generate", model_folder, "--prompt", "The code of the old light", *options), *words)


def test_an_empty_prompt_and_a_missing_model(run, model_folder, tmp_path):
    refused(run("generate", model_folder, "--prompt", ""), "empty")
    refused(run("generate", tmp_path, "--prompt", "x"), str(tmp_path), "smollm2-135m")


@pytest.mark.parametrize(("cr", "words"), [(0.5, ["0.5", "1 or more"]), (20, ["20", "up to 8"]), ("nan", ["nan"])])
def test_ratios_that_no_adapter_holds(run, model_folder, adapter_folder, cr, words):
    refused(run("generate", model_folder, "--prompt", "x", "--adapter", adapter_folder, "--cr", cr), *words)


def test_adapters_that_do_not_fit(run, model_folder, adapter_folder, tmp_path):
    def with_adapter(folder):
        return run("generate", model_folder, "--prompt", "x", "--adapter", folder, "--cr", 4)

    refused(with_adapter(tmp_path / "nowhere"), "nowhere")
    refused(with_adapter(write_adapter(tmp_path / "other", hidden_size=64)), "hidden_size 64", "hidden_size 32")

    damaged = shutil.copytree(adapter_folder, tmp_path / "truncated")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    refused(with_adapter(damaged), "damaged")

    unknown = shutil.copytree(adapter_folder, tmp_path / "unknown")
    config = json.loads((unknown / "adapter_config.json").read_text())
    (unknown / "adapter_config.json").write_text(json.dumps(config | {"colour": "red"}))
    refused(with_adapter(unknown), "colour")


def test_a_text_longer_than_the_context(run, adapter_folder, tmp_path):
    model = save_model(tmp_path / "short", max_position_embeddings=16)
    text = tmp_path / "text.txt"
    text.write_text("The access code of the old lighthouse is 12345. " * 9)
    page = tmp_path / "page.html"
    outcome = run("inspect", model, "--adapter", adapter_folder, "--file", text, "--html", page)
    refused(outcome, "context is 16", "shorten")
    assert not page.exists()
