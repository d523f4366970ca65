"""launch: a command ends with all that it started, and shards are what configs/accelerate/fsdp2.yaml says."""

import sys
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from sparsekv.bench.training.launch import SHARDS, command_of, last_words, start

FSDP2 = Path(__file__).parents[3] / "configs" / "accelerate" / "fsdp2.yaml"
WORKER = """
import subprocess, sys, time, pathlib
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(worker.pid))
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _settings(arguments: list[str]) -> dict[str, str]:
    parsed = launch_command_parser().parse_args([*arguments, "--num_processes", "2", "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE", "FSDP"))}


def test_a_killed_command_leaves_no_worker_in_a_session_of_its_own(tmp_path):
    told = tmp_path / "pid"
    command = [sys.executable, "-c", WORKER, str(told)]
    assert start(command, tmp_path / "log", seconds=30, until=lambda: told.exists() and bool(told.read_text())) is None
    assert not _alive(int(told.read_text()))


def test_a_command_that_hangs_is_ended(tmp_path):
    told = tmp_path / "pid"
    with pytest.raises(TimeoutError, match="not done after 2 s"):
        start([sys.executable, "-c", WORKER, str(told)], tmp_path / "log", seconds=2)
    assert not _alive(int(told.read_text()))


def test_what_failed_is_told_by_its_exit_code_and_its_error(tmp_path):
    script = "import sys; print('x', flush=True); print('ValueError: too small\\n  at 3', file=sys.stderr); sys.exit(3)"
    assert start([sys.executable, "-c", script], tmp_path / "log", seconds=30) == 3
    assert last_words(tmp_path / "log") == "ValueError: too small"


def test_shards_are_those_of_the_file_that_users_are_given():
    ours = _settings(SHARDS)
    assert ours == _settings(["--config_file", str(FSDP2)])
    assert ours["FSDP_VERSION"] == "2"


@pytest.mark.parametrize(
    ("way", "gpus", "words"),
    [
        ("alone", True, "-m some.module a"),
        ("replicas", True, "-m accelerate.commands.launch --multi_gpu --num_processes 2"),
        ("shards", True, "-m accelerate.commands.launch --use_fsdp"),
        ("halves", False, "-m torch.distributed.run --nproc-per-node 2"),
    ],
)
def test_the_launcher_of_each_way(way, gpus, words):
    command = " ".join(command_of(way, "some.module", ["a"], processes=2, gpus=gpus)[1:])
    assert command.startswith(words)
    assert command.endswith("-m some.module a")
