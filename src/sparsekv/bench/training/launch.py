"""Commands of several processes as a user starts them, with an end: a launcher and all that it started can be killed.

torchrun's workers have sessions of their own, so that a signal to the launcher's group does not reach them.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

WAYS = ("alone", "replicas", "shards", "halves")
"""One process; a whole model in each; pieces of the weights (FSDP2); a part of every layer (tensor parallel)."""
SHARDS = [
    "--use_fsdp",
    *("--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_reshard_after_forward", "true"),
    *("--fsdp_cpu_ram_efficient_loading", "false"),
    *("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
    *("--num_machines", "1"),
    *("--mixed_precision", "no"),
]
"""What configs/accelerate/fsdp2.yaml says, for where that file is not at hand."""


def command_of(
    way: str, module: str, arguments: Sequence[str], *, processes: int, gpus: bool, shards: Sequence[str] = SHARDS
) -> list[str]:
    """The shell's words that run a module in one of WAYS. shards: accelerate's options for them. Without GPUs torchrun
    starts replicas and halves, since accelerate starts one process on a CPU; shards need GPUs."""
    assert way in WAYS
    python, target = [sys.executable, "-m"], [module, *arguments]
    if way == "alone":
        return [*python, *target]
    count, port = str(processes), str(_free_port())
    if not gpus:
        return [*python, "torch.distributed.run", "--nproc-per-node", count, "--master-port", port, "-m", *target]
    settings = shards if way == "shards" else ["--multi_gpu"]
    launcher = ["accelerate.commands.launch", *settings, "--num_processes", count, "--main_process_port", port]
    return [*python, *launcher, "-m", *target]


def start(
    command: Sequence[str],
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    until: Callable[[], bool] = lambda: False,
) -> int | None:
    """Run a command, its output in `log`; returns the exit code, or None where `until` came true and it was killed with
    all its processes (SIGKILL). Raises TimeoutError after so many seconds, when nothing of it is left either."""
    deadline = time.monotonic() + seconds
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=os.environ | (environment or {})
        )
        try:
            while (code := process.poll()) is None:
                if until():
                    return None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {seconds:.0f} s")
                time.sleep(0.1)
            return code
        finally:
            if process.returncode is None:
                _kill(process)


def last_words(log: Path) -> str:
    """The line of a log that says best why it failed: the last that names an error, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return (errors or lines or ["no output"])[-1][-300:]


def _kill(process: subprocess.Popen[bytes]) -> None:
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in whole:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(whole[1:], timeout=30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
