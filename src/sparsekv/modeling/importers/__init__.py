"""Checkpoints of other DMS code, converted into adapters; one module each."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sparsekv.modeling.adapter import AdapterConfig, write_adapter
from sparsekv.modeling.importers.fastdms import convert_fastdms
from sparsekv.modeling.importers.nvidia import convert_nvidia

_CONVERTERS: dict[str, Callable[[str, str | None], tuple[AdapterConfig, dict[str, Tensor]]]] = {
    "nvidia": convert_nvidia,
    "fastdms": convert_fastdms,
}


def convert(kind: str, src: str, *, dst: str | Path, base: str | None = None) -> AdapterConfig:
    """Convert a checkpoint into an adapter folder; returns its configuration.

    kind: "nvidia" or "fastdms". src: a folder, file or hub id. base: the model that eviction heads were trained on,
    where src does not hold it.

    Raises ValueError, and writes nothing, for an unknown kind or a checkpoint that is foreign, damaged or truncated.
    """
    if kind not in _CONVERTERS:
        raise ValueError(f"unknown kind of checkpoint {kind!r}; use one of {', '.join(_CONVERTERS)}")
    if Path(dst).is_file():
        raise ValueError(f"{dst} is a file; give a folder for the adapter")
    config, state = _CONVERTERS[kind](src, base)
    write_adapter(dst, config, state)
    return config
