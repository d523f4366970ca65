"""What test_distributed.py starts in each process. Arguments: a YAML file, and "run" or "train".

accelerate shards on accelerators alone, so for FSDP on the CPU it is told that gloo is the backend of some GPUs.
"""

import os
import sys

import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from retrofitting import trained
from sparsekv.retrofit.config import load_config
from sparsekv.retrofit.run import run

if __name__ == "__main__":
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        dist.init_process_group("gloo")
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    config = load_config(sys.argv[1])
    if sys.argv[2] == "run":
        run(config)
    else:
        model, _ = trained(config)
        assert config.tensor_parallel > 1 or all(isinstance(p, DTensor) == sharded for p in model.parameters())
        layers = model.get_decoder().layers
        assert all(isinstance(layer, FSDPModule) == sharded for layer in layers), "gathered one after another"
    assert PartialState().num_processes == 2
    os._exit(0)  # at a Python's end gloo's threads may still free tensors, and that aborts the process
