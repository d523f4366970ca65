"""Two processes, replicas, shards of the weights (FSDP2) or halves of the model, give the losses of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import Qwen3Config, StableLmConfig

import distributing
from distributing import fork, free_port
from retrofitting import Configure, trained
from sparsekv.modeling.adapter import HEAD, PREFIX, read_adapter
from sparsekv.retrofit.config import RetrofitConfig, save_config
from sparsekv.retrofit.run import check_processes, run
from sparsekv.retrofit.training.checkpoint import CHECKPOINTS

FSDP2 = Path(__file__).parents[3] / "configs" / "accelerate" / "fsdp2.yaml"


def launched(config: RetrofitConfig, folder: Path) -> list[dict[str, Any]]:
    """The metrics of two shards, started by `accelerate launch` with the file that users are given."""
    _save(config, folder)
    command = [sys.executable, "-m", "accelerate.commands.launch", *_settings(folder)]
    done = subprocess.run(
        [*command, distributing.__file__, str(folder / "run.yaml"), "train"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return metrics(config)


def forked(config: RetrofitConfig, folder: Path, *, fsdp: bool = False, what: str) -> list[dict[str, Any]]:
    """The metrics of two processes with what launchers tell theirs."""
    _save(config, folder)
    environment = {}
    if fsdp:
        parsed = launch_command_parser().parse_args([*_settings(folder), "script.py"])
        environment = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    code = fork(2, distributing.main, [str(folder / "run.yaml"), what], folder / "log", **environment)
    assert code == 0, (folder / "log").read_text()
    return metrics(config)


def _save(config: RetrofitConfig, folder: Path) -> None:
    folder.mkdir()
    save_config(config, folder / "run.yaml")


def _settings(folder: Path) -> list[str]:
    settings = yaml.safe_load(FSDP2.read_text()) | {"num_processes": 2, "use_cpu": True}
    (folder / "launch.yaml").write_text(yaml.safe_dump(settings | {"main_process_port": free_port()}))
    return ["--config_file", str(folder / "launch.yaml")]


def metrics(config: RetrofitConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for name in ("step", "loss", "divergence", "hinge", "fraction"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-4), name


CHANGES = {"lr": 0.05, "base_lr": 1e-3, "batch": 4, "max_steps": 3, "length": 256}


@pytest.mark.parametrize("trainable", ["heads", "all"])
def test_two_replicas_give_the_losses_of_one_and_one_adapter(
    configure: Configure, tmp_path: Path, trainable: str
) -> None:
    changes = CHANGES | {"decay_steps": 2, "trainable": trainable}
    _, alone = trained(configure(output=str(tmp_path / "one"), **changes))
    config = configure(output=str(tmp_path / "two"), **changes)
    same(forked(config, tmp_path / "launch", what="run"), alone)
    assert len(read_adapter(config.output)[0].offsets) == 3


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_two_shards_give_the_losses_of_one_which_can_go_on_for_them(
    configure: Configure, tmp_path: Path, trainable: str
) -> None:
    changes = CHANGES | {"trainable": trainable}
    _, alone = trained(configure(output=str(tmp_path / "one"), **changes))
    two = str(tmp_path / "two")
    config, folder = configure(output=two, **changes | {"max_steps": 2}), tmp_path / "launch"
    together = launched(config, folder) if trainable == "lora" else forked(config, folder, fsdp=True, what="train")
    same(together, alone[:2])
    _, resumed = trained(configure(output=two, **changes))
    same(resumed, alone)
    assert resumed[:2] == together


def test_two_halves_of_a_model_give_the_losses_and_the_heads_of_one_and_take_turns_with_it(
    configure: Configure, tmp_path: Path
) -> None:
    def killed_at_step_4(config: RetrofitConfig) -> RetrofitConfig:
        shutil.rmtree(Path(config.output) / CHECKPOINTS / "checkpoint-6")
        return config

    changes = CHANGES | {"max_steps": 6}
    one, two = ({**changes, "output": str(tmp_path / name)} for name in ("one", "two"))
    model, alone = trained(configure(**one))
    same(forked(configure(**two, tensor_parallel=2), tmp_path / "first", what="train"), alone)
    run(killed_at_step_4(configure(**two)), say=print)
    goes_on = killed_at_step_4(configure(**one, tensor_parallel=2, gradient_checkpointing=True))
    same(forked(goes_on, tmp_path / "second", what="run"), alone)
    heads = {PREFIX + name: p.detach() for name, p in model.named_parameters() if f".{HEAD}." in name}
    (ours, by_two), (theirs, by_one) = read_adapter(one["output"]), read_adapter(two["output"])
    for made in (by_one, by_two):
        torch.testing.assert_close(made, heads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(ours.offsets), torch.tensor(theirs.offsets), rtol=0, atol=0.01)
    assert set(ours.to_dict()) == set(theirs.to_dict())


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 1, "tensor_parallel is 2 and the processes are 1: all of them share the model"),
        ({}, 4, "tensor_parallel is 2 and the processes are 4"),
        ({"model": "qwen3"}, 2, "tensor_parallel is 2; it must divide the 3 KV heads of .*qwen3"),
        ({"model": "stablelm"}, 2, "Transformers has no tensor parallel plan for stablelm: use tensor_parallel: 1"),
        ({"teacher": "qwen3"}, 2, "it must divide the 3 KV heads of .*qwen3"),
    ],
)
def test_a_model_that_the_processes_cannot_share_is_one_sentence(
    configure: Configure, tmp_path: Path, changes: dict[str, str], processes: int, message: str
) -> None:
    Qwen3Config(num_attention_heads=6, num_key_value_heads=3).save_pretrained(tmp_path / "qwen3")
    StableLmConfig().save_pretrained(tmp_path / "stablelm")
    named = {key: str(tmp_path / value) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        check_processes(configure(tensor_parallel=2, **named), processes)


def test_halves_of_a_model_are_of_a_frozen_one_and_not_of_shards(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_processes(configure(tensor_parallel=2), 2)
    with pytest.raises(ValueError, match="use trainable: heads, or FSDP to train lora"):
        configure(tensor_parallel=2, trainable="lora")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="launch them without FSDP's settings"):
        check_processes(configure(tensor_parallel=2), 2)
