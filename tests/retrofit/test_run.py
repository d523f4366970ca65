"""A whole run: the folder it leaves, going on after a stop, and folders it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from typer.testing import CliRunner

import sparsekv
import tiny
from commands import save_model
from sparsekv.cli.main import app
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.load import load_model
from sparsekv.retrofit import __main__ as entry
from sparsekv.retrofit.config import RetrofitConfig, save_config
from sparsekv.retrofit.data.documents import read_all
from sparsekv.retrofit.data.rows import blend
from sparsekv.retrofit.export import export
from sparsekv.retrofit.run import load_for_training, load_result, load_teacher, prepare_output, run
from sparsekv.retrofit.training.checkpoint import reason
from sparsekv.retrofit.training.trainer import adapter_config, train

Configure = Callable[..., RetrofitConfig]
EVALUATION = {"ratios": [1, 2], "rows": 2, "length": 128, "items": 1, "contexts": [256], "batch": 2}


def test_one_command_leaves_a_finished_adapter(configure: Configure, tmp_path: Path) -> None:
    config = configure(max_steps=2, lr=0.05, evaluation=EVALUATION)
    said: list[str] = []
    output = run(config, say=said.append)
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "config.yaml"),
        *("metrics.jsonl", "eval.json", "README.md"),
    }
    adapter, _ = read_adapter(output)
    assert adapter.training["steps"] == 2
    assert adapter.training["final_cr"] == 2
    assert [ratio for _, ratio in adapter.offsets] == pytest.approx([1.5, 2, 3], rel=0.1)
    results = json.loads((output / "eval.json").read_text())
    assert [score["asked"] for score in results["scores"]] == [1, 2]
    assert results["scores"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    card = (output / "README.md").read_text()
    assert "trained towards ratio 2 (its last step marked " in card
    assert f"| {adapter.offsets[0][0]:+.3f} | {adapter.offsets[0][1]:.3f} |" in card
    assert any("Evaluating" in line for line in said)
    model, _ = load_model(config.model, device="cpu")
    sparsekv.attach(model, adapter=str(output), cr=2)
    with pytest.raises(ValueError, match="holds a finished adapter"):
        run(config)


def test_lora_is_one_folder_and_merges_into_a_plain_model(configure: Configure, tmp_path: Path) -> None:
    config = configure(max_steps=2, lr=0.05, base_lr=0.05, trainable="lora", evaluation=EVALUATION)
    output, ids = run(config), torch.arange(40)[None]
    adapter, state = read_adapter(output)
    assert "LoRA of rank 16 was trained with them (learning rate 0.05)" in (output / "README.md").read_text()
    assert (adapter.r, adapter.lora_alpha, len(state)) == (16, 32, 2 * (2 + 7 * 2))
    assert json.loads((output / "eval.json").read_text())["scores"][0]["divergence"] > 1e-4  # from the base model
    model, _ = load_model(config.model, device="cpu")
    plain = model(ids).logits
    sparsekv.attach(model, adapter=str(output), cr=2)
    ours = model(ids).logits
    done = CliRunner().invoke(app, ["convert", "merged", str(output), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged, _ = load_model(str(tmp_path / "merged" / "model"), device="cpu")
    assert not torch.allclose(merged(ids).logits, plain, atol=1e-3)
    sparsekv.attach(merged, adapter=str(tmp_path / "merged"), cr=2)
    assert torch.allclose(merged(ids).logits, ours, atol=1e-5)
    sparsekv.detach(model)
    assert torch.equal(model(ids).logits, plain)
    again = CliRunner().invoke(app, ["convert", "merged", str(output), str(tmp_path / "merged")])
    assert again.exit_code == 2 and "is not empty; name a new folder" in again.output
    twice = CliRunner().invoke(app, ["convert", "merged", str(tmp_path / "merged"), str(tmp_path / "twice")])
    assert twice.exit_code == 2 and "has no LoRA to merge" in twice.output


def test_all_weights_are_a_plain_model_with_the_heads_beside_it(configure: Configure) -> None:
    config = configure(max_steps=2, lr=0.05, base_lr=0.05, trainable="all", evaluation=EVALUATION)
    output, ids = run(config), torch.arange(40)[None]
    base, _ = load_model(config.model, device="cpu")
    model, _ = load_model(str(output / "model"), device="cpu")
    assert read_adapter(output)[0].base_model_name_or_path == str(output / "model")
    assert "All weights were trained with them" in (output / "README.md").read_text()
    assert not any("eviction" in name for name in model.state_dict())
    scores = json.loads((output / "eval.json").read_text())["scores"]
    assert scores[0]["divergence"] > 1e-3  # at ratio 1: from the base model, not from itself
    assert scores[0]["perplexity"] != pytest.approx(scores[0]["perplexity_dense"], rel=1e-4)
    assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
    sparsekv.attach(model, adapter=str(output), cr=2)


def test_a_neuron_source_is_a_plain_model_and_a_table(configure: Configure) -> None:
    config = configure(source="neuron", neuron={"fade_steps": 1}, trainable="all", max_steps=2, lag=1)
    adapter, state = read_adapter(run(config))
    assert adapter.source == "neuron" and adapter.neuron is not None and adapter.neuron.rezero and not state
    assert len(adapter.offsets) > 0
    model, _ = load_model(adapter.base_model_name_or_path, device="cpu")
    sparsekv.attach(model, adapter=config.output, cr=1.5)


def test_dmc_is_a_plain_model_that_decides_as_it_was_trained(configure: Configure) -> None:
    config = configure(
        **{"policy": "dmc", "source": "neuron", "neuron": {"fade_steps": 1}, "trainable": "all", "lag": 1},
        **{"window": 5, "pull": "hinge_text", "fraction": "hard", "base_lr": 1e-3, "max_steps": 6, "length": 256},
        evaluation=EVALUATION,
    )
    model, tokenizer = load_for_training(config)
    rows = blend(read_all(config.data, tokenizer, model=config.model, seed=0), tokenizer, count=12, length=256, seed=0)
    weights = train(model, rows, config, teacher=load_teacher(config, tokenizer), progress=False)
    ids, again = torch.arange(60)[None], replace(config, output=config.output + "-again")
    export(weights, config.model, folder=Path(again.output), adapter=adapter_config(model, config))
    with torch.no_grad():
        assert torch.equal(load_result(again)[0](ids).logits, model(ids).logits)
    adapter, state = read_adapter(run(config))
    assert (adapter.policy, adapter.window, adapter.source) == ("dmc", 5, "neuron") and not state
    assert [ratio for _, ratio in adapter.offsets] == pytest.approx([1.5, 2, 3], rel=0.1)
    card = (Path(config.output) / "README.md").read_text()
    assert "Dynamic Memory Compression, arXiv 2403.09636" in card and "Eviction heads" not in card
    served, _ = load_model(adapter.base_model_name_or_path, device="cpu")
    policy = sparsekv.attach(served, adapter=config.output, cr=2).policy
    assert policy.name == "dmc"
    cache = sparsekv.SparseCache(served)
    with torch.no_grad():
        served(torch.arange(128)[None], past_key_values=cache)
    assert cache.stats().compression_ratio > 1.2


def test_a_teacher_with_another_vocabulary_is_refused(configure: Configure, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"the teacher .* has another vocabulary \(312 tokens\) than .* \(329\)"):
        run(configure(teacher=str(teacher)))


def test_another_teacher_is_learnt_from(configure: Configure, tmp_path: Path) -> None:
    teacher = tiny.save(tmp_path / "teacher", seed=1)
    config = configure(teacher=str(teacher), max_steps=1)
    first = json.loads((run(config) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["divergence"] > 0.01  # not the model itself, from which it hardly differs at the start


def test_chats_are_packed_trained_on_and_held_out(configure: Configure, folder: Path, tmp_path: Path) -> None:
    turns = [[("user", f"question {i}"), ("assistant", tiny.text(30, seed=i))] for i in range(100)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    hay = {"kind": "retrieval", "names": [str(folder / "texts")]}
    data = [{"kind": "jsonl", "names": [str(tmp_path / "chats.jsonl")], "weight": 3}, hay]
    output = run(configure(max_steps=2, lr=0.05, data=data), say=lambda text: None)
    adapter, _ = read_adapter(output)
    assert adapter.calibration["text"] == f"75% {tmp_path / 'chats.jsonl'}, 25% long-range retrieval"
    assert len(adapter.offsets) == 3
    assert adapter.calibration["length"] < 100  # a chat's, which no other is joined to


def test_a_run_that_was_stopped_after_training_goes_on_with_its_heads(configure: Configure, monkeypatch) -> None:
    config = configure(max_steps=2)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekv.retrofit.run.fill_table", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    heads = read_adapter(config.output)[1]
    monkeypatch.undo()
    monkeypatch.setattr("sparsekv.retrofit.run.train", stop)
    run(config)
    adapter, again = read_adapter(config.output)
    assert len(adapter.offsets) == 3
    assert all(torch.equal(heads[key], again[key]) for key in heads)


def test_output_folders_that_do_not_fit_are_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        prepare_output(configure(output=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="cannot make the output folder"):
        prepare_output(configure(output=str(tmp_path / "file" / "out")))
    config = configure(output=str(tmp_path / "other"))
    prepare_output(config)
    save_config(config, tmp_path / "other" / "config.yaml")
    prepare_output(configure(output=str(tmp_path / "other"), save_every=7))
    with pytest.raises(ValueError, match=r"holds another run \(window 8 there, 9 here\)"):
        prepare_output(configure(output=str(tmp_path / "other"), window=9))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter that this run did not make"):
        prepare_output(configure(output=str(tmp_path / "foreign")))


def test_a_mistake_in_the_data_leaves_the_folder_free(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": []})] * 20))
    bad = configure(data=[{"kind": "jsonl", "names": [str(tmp_path / "chats.jsonl")]}])
    with pytest.raises(ValueError):  # noqa: PT011
        run(bad)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError):  # noqa: PT011
        run(configure(data=[{"kind": "text", "names": [str(tmp_path / "empty.txt")]}]))
    other = save_model(tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary"):
        run(configure(teacher=str(other)))
    assert not (Path(bad.output) / "config.yaml").exists()
    prepare_output(configure(window=9))


def test_a_full_disk_leaves_no_half_of_a_merged_model(configure: Configure, tmp_path: Path, monkeypatch) -> None:
    output = run(configure(max_steps=1, trainable="lora"))

    def full(model: Any, base: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparsekv.retrofit.export._save", full)
    done = CliRunner().invoke(app, ["convert", "merged", str(output), str(tmp_path / "merged")])
    assert done.exit_code == 2
    assert "merged (I/O error: No space left on device (os error 28)); make room there" in done.stderr
    assert not list(tmp_path.glob("merged*"))


def test_the_reason_of_a_failed_checkpoint_has_no_traceback() -> None:
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        found = CheckpointException("save", {0: _wrap_exception(error)})
    assert reason(found) == "No space left on device"


def test_a_model_or_device_that_is_not_there_is_one_sentence(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*nothing") as caught:
        load_model(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is cuda and this machine shows none"):
            load_model(configure().model, device="cuda")


def test_the_commands(configure: Configure, tmp_path: Path) -> None:
    save_config(configure(max_steps=1), tmp_path / "run.yaml")
    runner = CliRunner()

    def call(*arguments: str) -> str:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    output = call("retrofit", str(tmp_path / "run.yaml"), "--set", f"output={tmp_path / 'a'}").strip().splitlines()[-1]
    assert output == str(tmp_path / "a")
    model, text = configure().model, configure().data[0].names[0]
    shared = [model, "--adapter", output, "--text", text, "--rows", "1", "--length", "128", "--json"]
    table = json.loads(call("calibrate", *shared, "--targets", "1.5,2.5"))["offsets"]
    assert [row["ratio"] for row in table] == pytest.approx([1.5, 2.5], rel=0.1)
    results = json.loads(call("eval", *shared, "--cr", "2", "--items", "1", "--contexts", "256"))
    assert (results["adapter"], results["settings"]["seed"]) == (output, 0)
    assert results.keys() >= {"commit", "hardware", "torch"}
    row = next(row for row in results["rows"] if row["policy"] == "dms")
    assert (row["task"], row["cr"]) == ("perplexity", 2)
    assert row["ratio"] == pytest.approx(2, rel=0.15)
    bad = runner.invoke(app, ["retrofit", str(tmp_path / "run.yaml"), "--set", "window=0"])
    assert bad.exit_code == 2


def test_the_plain_entry_prints_one_sentence_for_a_mistake(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"model": "m", "output": "o", "data": [{"kind": "text", "names": ["t"]}], "window": 0})
    )
    assert entry.main([str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith("Error: window is 0")
    assert entry.main([]) == 2
