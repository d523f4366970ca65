"""A foreign checkpoint: its configuration, and its tensors by name, read one at a time and never all at once.

A folder or file with safetensors or PyTorch files, whole or in shards; safetensors are read through `safe_open`, .bin
files through memory maps.
"""

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekv.modeling.adapter import SHAPE_KEYS

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WANTED = ["*.safetensors", "*.json", "*.yaml", "pytorch_model*.bin"]
FAMILIES = ("llama", "qwen3")
"""The model types whose checkpoints are known: an RMSNorm that multiplies by its weight, and one name per tensor."""


class Checkpoint:
    """name: a folder, a file or a hub id. Raises ValueError where it is none, damaged, truncated or not of FAMILIES."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = _locate(name)
        self.folder = path if path.is_dir() else path.parent
        self.config = read_json(self.folder / "config.json")
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        self._files = self._index(path)
        if not self._files:
            raise ValueError(f"{name} is no checkpoint: it has no safetensors and no pytorch_model.bin")
        kind = self.config.get("model_type")
        if self.config and kind not in FAMILIES:
            raise ValueError(f"{name} is a model of type {kind!r}; only {' and '.join(FAMILIES)} can be converted")

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._files)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor. Raises ValueError where it is missing or of another shape."""
        if name not in self._files:
            raise ValueError(f"{self.name} is truncated: it has no {name}")
        found = self._opened(self._files[name])[name].detach()
        if tuple(found.shape) != shape:
            raise ValueError(f"{self.name} has {name} of shape {tuple(found.shape)}, and its model needs {shape}")
        return found

    def shape(self) -> dict[str, Any]:
        """What an adapter must agree on with its base model. Raises ValueError for a configuration without it."""
        if not self.config:
            raise ValueError(f"{self.name} has no config.json; pass the model it was trained from as base (--base)")
        missing = [key for key in SHAPE_KEYS if key not in self.config]
        if missing:
            raise ValueError(f"{self.name}/config.json is incomplete: it has no {', '.join(missing)}")
        return {key: self.config[key] for key in SHAPE_KEYS}

    def _index(self, path: Path) -> dict[str, Path]:
        """Tensor name -> file."""
        if path.is_file():
            return dict.fromkeys(self._opened(path), path)
        for index in _INDEXES:
            shards = read_json(path / index).get("weight_map", {})
            for shard in sorted(set(shards.values())):
                if not (path / shard).is_file():
                    raise ValueError(f"{self.name} is truncated: {index} names {shard}, which is not there")
            if shards:
                lost = [name for name, shard in shards.items() if name not in self._opened(path / shard)]
                if lost:
                    raise ValueError(f"{self.name} is truncated: {shards[lost[0]]} has no {lost[0]}")
                return {name: path / shard for name, shard in shards.items()}
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        return {name: file for file in files for name in self._opened(file)}

    def _opened(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open:
            self._open[file] = self._read(file)
        return self._open[file]

    def _read(self, file: Path) -> Mapping[str, Tensor]:
        try:
            if file.suffix == ".safetensors":
                return _Lazy(file)
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{self.name} is damaged: {file.name} cannot be read ({reason})") from None


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a checkpoint's decisions are to be read: z = scale * x - shift."""

    window: int
    """sparsekv's: tokens that every query sees, the current one included."""
    scale: float
    shift: float
    ratio: float | None
    """The compression ratio that it was trained to."""

    @classmethod
    def read(cls, name: str, raw: dict[str, Any]) -> "Settings":
        """raw: window_size (its W sees q - k <= W, so the window is W + 1), alpha_scale, alpha_offset, cr.

        Raises ValueError for a missing window or what is no number.
        """
        window, ratio = raw.get("window_size"), raw.get("cr")
        scale, shift = raw.get("alpha_scale", 100.0), raw.get("alpha_offset", 5.0)
        if type(window) is not int or window < 0:
            raise ValueError(f"{name}: the window size is {window!r}; its configuration must give a whole number")
        for key, value in (("scale", scale), ("offset", shift)):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name}: the {key} of its logits is {value!r}; its configuration must give a number")
        return cls(window=window + 1, scale=float(scale), shift=float(shift), ratio=ratio)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises ValueError for anything else."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return raw


def _locate(name: str) -> Path:
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise ValueError(f"there is no checkpoint {name}: neither a folder here nor one that the hub gives") from None
