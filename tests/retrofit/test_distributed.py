"""Two processes, replicas or shards of the weights (FSDP2), give the losses of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrofitting import Configure, trained
from sparsekv.modeling.adapter import read_adapter
from sparsekv.retrofit.config import RetrofitConfig, save_config

SCRIPT = Path(__file__).parent / "distributed.py"
FSDP2 = Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2.yaml"


def start(config: RetrofitConfig, folder: Path, *, fsdp: bool, what: str) -> list[dict[str, Any]]:
    """The metrics of two processes by `accelerate launch`."""
    folder.mkdir()
    save_config(config, folder / "run.yaml")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = yaml.safe_load(FSDP2.read_text())
    if not fsdp:
        settings |= {"distributed_type": "MULTI_CPU"}
        del settings["fsdp_config"]
    settings |= {"num_processes": 2, "use_cpu": True, "main_process_port": port}
    (folder / "launch.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder / "run.yaml"), what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for name in ("step", "loss", "divergence", "hinge", "fraction"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-4), name


CHANGES = {"lr": 0.05, "base_lr": 1e-3, "batch": 4, "max_steps": 3, "length": 256}


def test_two_replicas_give_the_losses_of_one_and_one_adapter(configure: Configure, tmp_path: Path) -> None:
    changes = CHANGES | {"decay_steps": 2}
    _, alone = trained(configure(output=str(tmp_path / "one"), **changes))
    config = configure(output=str(tmp_path / "two"), **changes)
    same(start(config, tmp_path / "launch", fsdp=False, what="run"), alone)
    assert len(read_adapter(config.output)[0].offsets) == 3


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_two_shards_give_the_losses_of_one_which_can_go_on_for_them(
    configure: Configure, tmp_path: Path, trainable: str
) -> None:
    changes = CHANGES | {"trainable": trainable}
    _, alone = trained(configure(output=str(tmp_path / "one"), **changes))
    two = str(tmp_path / "two")
    together = start(configure(output=two, **changes | {"max_steps": 2}), tmp_path / "launch", fsdp=True, what="train")
    same(together, alone[:2])
    _, resumed = trained(configure(output=two, **changes))
    same(resumed, alone)
    assert resumed[:2] == together
