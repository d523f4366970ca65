"""Other people's engines, with our cache inside. Each is imported only when it is asked for."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "vllm":
        raise AttributeError(f"module 'sparsekv.integrations' has no attribute {name!r}")
    return import_module("sparsekv.integrations.vllm")
