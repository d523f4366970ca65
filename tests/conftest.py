"""Settings of every test: one thread a worker (pytest-xdist runs several), and hypothesis without a clock."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)

# Without a GPU, kernels run in Triton's interpreter, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A deadline measures the machine, not the code. In CI the examples are the same in every run.
settings.register_profile("sparsekv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sparsekv")
