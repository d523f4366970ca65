"""`sparsekv plan`: by name, folder and file; what it prints is the plan; mistakes are one sentence."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from sparsekv.cost import HARDWARE, plan, shape_of


def record(run, *words):
    outcome = run("plan", *words, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def refused(outcome, *words):
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert len(outcome.err.strip().splitlines()) == 1
    for word in words:
        assert word in outcome.err


def test_json_is_the_plan_of_each_ratio_dense_first(run):
    found = record(run, "llama3.1-8b", "--batch", 256, "--context", 8192, "--cr", 8)
    shape, gpu = shape_of("llama3.1-8b"), HARDWARE["h100-sxm"]
    assert found["plans"] == [plan(shape, gpu, batch=256, context=8192, ratio=ratio).to_dict() for ratio in (1.0, 8.0)]
    assert found["plans"][0]["kv_bytes"] == 256 * 2**30
    assert {row["context"] for row in found["chains"]} == {4096 << i for i in range(6)}
    assert found["measured"] == []


def test_measured_steps_are_named_where_there_are_any(run):
    measured = record(run, "qwen3-8b")["measured"]
    assert measured and all(step["over"] > 1 for step in measured)
    assert f"{min(step['over'] for step in measured):.2f} to" in run("plan", "qwen3-8b").out
    assert "nothing says how far off" in run("plan", "qwen3-8b", "--gpu", "h200").out


def test_the_table_shows_rates_only_where_given(run):
    without = run("plan", "smollm2-135m").out
    assert "ratio 8" in without and "latency, ms" in without and "CO2" not in without and "price" not in without
    out = run("plan", "smollm2-135m", "--grid", 400, "--price", 2).out
    assert "CO2" in out and "price" in out


def test_beyond_the_models_context_it_says_so(run):
    assert "made for 8,192 tokens" in run("plan", "smollm2-135m", "--context", 1 << 20).out
    assert "made for" not in run("plan", "smollm2-135m").out


def test_a_folder(run, model_folder):
    shape = record(run, model_folder, "--gpu", "cpu")["shape"]
    config = json.loads((model_folder / "config.json").read_text())
    assert (shape["layers"], shape["d"]) == (config["num_hidden_layers"], config["hidden_size"])
    assert shape["kv_heads"] == config["num_key_value_heads"]


def test_limits_and_a_device_of_ones_own(run, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("flops: 1e+14\nbandwidth: 1e+12\nmemory: 64e+9\npower: 300\n")
    wide = record(run, "llama3.1-8b", "--gpu", file)
    tight = record(run, "llama3.1-8b", "--gpu", file, "--memory", "20GiB", "--step-ms", 17)
    assert wide["gpu"]["name"] == "own"
    for one, other in zip(wide["plans"], tight["plans"], strict=True):
        assert one["seconds"] == other["seconds"] and one["largest_batch"] > other["largest_batch"] > 0


def test_a_config_file_and_its_unknown_keys(run, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("model: llama3.1-8b\nbatch: 4\ncr: [4]\n")
    found = record(run, "--config", file, "--batch", 2)
    assert found["batch"] == 2 and [one["ratio"] for one in found["plans"]] == [1, 4]
    file.write_text("model: llama3.1-8b\ncolour: red\n")
    refused(run("plan", "--config", file), "colour", "batch")


def test_the_picture(run, tmp_path):
    file = tmp_path / "plan.png"
    outcome = run("plan", "llama3.1-8b", "--batch", 256, "--plot", file, "--json")
    assert outcome.code == 0 and json.loads(outcome.out)
    with Image.open(file) as image:
        assert image.size == (1280, 672)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["llama3.1-70b"], ["131.4 GiB", "b200", "smaller model"]),
        (["llama3.1-8b", "--gpu", "h900"], ["h900", "h100-sxm", "YAML"]),
        (["llama3.1-8b", "--cr", 0.5], ["0.5", "from 1"]),
        (["llama3.1-8b", "--context", (1 << 20) + 1], ["1,048,576"]),
        (["llama3.1-8b", "--batch", 0], ["batch is 0"]),
        (["llama3.1-8b", "--memory", "lots"], ["lots", "2GiB"]),
        (["llama3.1-8b", "--memory", "100GiB"], ["74.5 GiB", "ask for less"]),
        (["llama3.1-8b", "--step-ms", 0], ["above 0"]),
        (["llama3.1-8b", "--price", -1], ["price per hour is -1"]),
        (["llama3.1-8b", "--plot", "no/such/folder/x.png"], ["folder that exists"]),
        (["llama3.1-8b", "--plot", "x.txt"], [".png"]),
    ],
)
def test_mistakes_are_one_sentence(run, words, told):
    refused(run("plan", *words), *told)


def test_a_folder_without_a_model(run, tmp_path):
    refused(run("plan", tmp_path), str(tmp_path), "qwen3-8b", "config.json")


def test_a_named_model_needs_no_framework():
    code = (
        "import sys; sys.argv = ['sparsekv', 'plan', 'qwen3-8b', '--json']\n"
        "from sparsekv.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print('LOADED', sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = out[out.index("LOADED") :]
    assert "'sparsekv'" in loaded and "'torch'" not in loaded and "'transformers'" not in loaded
