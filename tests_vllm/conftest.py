"""Tests that need vLLM, in the environment that `make test-vllm` makes. No other suite collects them.

vLLM reads its settings from the environment when it is imported: the engine in this process, plugins by entry point
alone, no network but this host's own.
"""

import os

import pytest
import torch
from hypothesis import settings

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc is given functions
    "VLLM_PLUGINS": "sparsekv",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_F32_DEFAULT": "ieee",  # vLLM's experts on a GPU would round float32 to 10 bits
}
torch.set_num_threads(1)
settings.register_profile("sparsekv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sparsekv")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Tiny models with adapters, by family, each made once."""
    from models import Made, make

    found: dict[str, Made] = {}

    def by_family(family: str, **options) -> Made:
        key = f"{family}{sorted(options.items())}"
        if key not in found:
            found[key] = make(tmp_path_factory.mktemp(family), family, **options)
        return found[key]

    return by_family
