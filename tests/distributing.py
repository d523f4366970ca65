"""A retrofit in each of several processes: what a launcher starts (arguments: a YAML file, and "run" or "train"), and
processes forked from a server that has imported everything, since that takes longer than what they do.

accelerate shards on accelerators alone, so for FSDP on the CPU it is told that gloo is the backend of some GPUs.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from retrofitting import trained
from sparsekv.retrofit.config import load_config
from sparsekv.retrofit.run import run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sparsekv.retrofit.run", "sparsekv.bench.training.together_process"])
SECONDS = 120


def main(path: str, what: str) -> int:
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        dist.init_process_group("gloo")
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    config = load_config(path)
    if what == "run":
        run(config)
    else:
        model, _ = trained(config)
        assert config.tensor_parallel > 1 or all(isinstance(p, DTensor) == sharded for p in model.parameters())
        layers = model.get_decoder().layers
        assert all(isinstance(layer, FSDPModule) == sharded for layer in layers), "gathered one after another"
    assert PartialState().num_processes == 2
    return 0


def fork(count: int, main: Callable[..., int], arguments: Sequence[Any], log: Path, **environment: str) -> int:
    """So many processes that call main(*arguments), with what a launcher sets; their output goes to `log`. Returns the
    first exit code that is not 0, when all have ended."""
    shared = environment | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [SERVER.Process(target=_begin, args=(main, arguments, log, each)) for each in own]
    for process in processes:
        process.start()
    until = time.monotonic() + SECONDS
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > until:
            for process in processes:  # which may wait for one that is gone
                process.kill()
        time.sleep(0.02)
    return next((process.exitcode for process in processes if process.exitcode), 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _begin(main: Callable[..., int], arguments: Sequence[Any], log: Path, environment: Mapping[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    _end(main, arguments)


def _end(main: Callable[..., int], arguments: Sequence[Any]) -> None:
    """At a Python's end gloo's threads may still free tensors, and that aborts the process."""
    code = 1
    try:
        code = main(*arguments)
    except BaseException:  # noqa: BLE001 - told to the test
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main, sys.argv[1:])
