"""Adapters: trained eviction heads and the table that dials them, as a folder of two files.

adapter_config.json holds AdapterConfig; adapter_model.safetensors holds the heads under PEFT's names
(`base_model.model.<module>.eviction_head.weight`), and none where the base model's own queries carry the logits (neuron
source). LoRA weights that were trained with them are in the same two files, in PEFT's names and keys, so that PEFT
reads them too. Nothing in it is executable.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekv.dms import EvictionHead, NeuronSource
from sparsekv.modeling.attached import ATTACHMENT
from sparsekv.modeling.dial import OffsetTable
from sparsekv.modeling.lora import A, B, Lora

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "eviction_head"
"""The name of an attention module's eviction head."""
SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""The entries of a model's configuration that an adapter must agree on with its base model."""
LORA_KEYS = ("r", "lora_alpha", "target_modules")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json holds."""

    base_model_name_or_path: str
    base_shape: dict[str, Any]
    """SHAPE_KEYS of the base model."""
    window: int
    """Tokens that stay visible whatever was decided (dms), or that a mean reached back in training (dmc)."""
    lag: int = 0
    policy: str = "dms"
    """"dms", or "dmc" with source "neuron"."""
    source: str = "linear"
    """"linear": eviction heads, in the adapter; "neuron": a channel of the base model's queries, as `neuron` says."""
    neuron: NeuronSource | None = None
    offsets: list[tuple[float, float]] = field(default_factory=list)
    """Calibrated (offset on the logits, compression ratio at calibration["length"] tokens), ascending in both."""
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """By further length in tokens: the ratios of the same offsets."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """How the table was measured: text, tokens, seed."""
    training: dict[str, Any] = field(default_factory=dict)
    """How the heads were trained: steps, data, seed, hardware."""
    r: int = 0
    """The rank of the LoRA weights that come with the heads; 0 = none."""
    lora_alpha: int = 0
    target_modules: list[str] = field(default_factory=list)
    """Names of the modules that LoRA changes."""

    def __post_init__(self) -> None:
        if self.r < 0 or bool(self.r) != bool(self.target_modules):
            raise ValueError(f"r is {self.r} and target_modules {self.target_modules}; LoRA has both, heads alone none")
        if self.source not in ("linear", "neuron"):
            raise ValueError(f"source is {self.source!r}; it must be 'linear' or 'neuron'")
        if self.policy not in ("dms", "dmc") or self.policy == "dmc" and self.source != "neuron":
            raise ValueError(f"policy is {self.policy!r}; it must be 'dms', or 'dmc' with source 'neuron'")
        if (self.source == "neuron") != isinstance(self.neuron, NeuronSource):
            raise ValueError("source 'neuron' comes with its channel, scale, offset and rezero, and 'linear' with none")

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds: LoRA's keys only where there is LoRA, whose type PEFT then knows."""
        raw = asdict(self)
        if not self.r:
            for name in LORA_KEYS:
                del raw[name]
        return raw | {"peft_type": "LORA" if self.r else "SPARSEKV_DMS"}

    def policy_options(self) -> dict[str, Any]:
        """What `attach` takes beside the policy's name."""
        window = {"reach": self.window} if self.policy == "dmc" else {"window": self.window, "lag": self.lag}
        return window | {"neuron": self.neuron}

    @property
    def table(self) -> OffsetTable:
        """The dial: offset and ratio by length."""
        return OffsetTable(
            window=1 if self.policy == "dmc" else self.window,
            offsets=self.offsets,
            length=self.calibration.get("length"),
            ratios={int(length): ratios for length, ratios in self.ratios.items()},
        )

    @property
    def max_cr(self) -> float:
        """The largest ratio of the table, at its own length."""
        return self.offsets[-1][1] if self.offsets else math.nan

    def offset_for(self, ratio: float, *, tokens: int | None = None) -> float:
        """See OffsetTable.offset_for."""
        return self.table.offset_for(ratio, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """An adapter read from disk and checked against a model."""

    config: AdapterConfig
    heads: dict[int, dict[str, Tensor]]
    """By layer: weight [kv_heads, hidden_size] and bias [kv_heads]."""
    head_state: dict[str, Tensor]
    """The same tensors by their names in the model."""
    lora: dict[str, Tensor]
    """By PEFT's names without their prefix; empty for heads alone."""

    def copy_into(self, heads: dict[int, EvictionHead]) -> None:
        """Load the trained weights. heads: by layer. Raises ValueError unless the adapter has exactly these layers."""
        if set(heads) != set(self.heads):
            raise ValueError(
                f"the adapter is damaged: it has heads for layers {sorted(self.heads)} and the model's full-attention "
                f"layers are {sorted(heads)}; fetch or train it again"
            )
        for layer, head in heads.items():
            head.load_state_dict(self.heads[layer])


def base_shape(model: PreTrainedModel | PreTrainedConfig) -> dict[str, Any]:
    """What an adapter must agree on with its base model."""
    config = _config_of(model).get_text_config(decoder=True)
    return {name: getattr(config, name, None) for name in SHAPE_KEYS}


def _config_of(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    return model.config if isinstance(model, PreTrainedModel) else model


def save_adapter(model: PreTrainedModel, folder: str | Path, config: AdapterConfig) -> None:
    """Write the eviction heads of an attached model, and the LoRA that its adapter brought, all or nothing.

    Raises ValueError if the model has no eviction heads.
    """
    state = {
        f"{name}.{key}": tensor.detach().float().cpu().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, EvictionHead)
        for key, tensor in module.state_dict().items()
    }
    if not state and config.source == "linear":
        raise ValueError("this model has no eviction heads to save; attach it with policy='dms' or an adapter first")
    lora = {} if (found := lora_of(model)) is None else found.state()
    write_adapter(folder, config, {PREFIX + name: tensor for name, tensor in (state | lora).items()})


def lora_of(model: PreTrainedModel) -> Lora | None:
    """The LoRA that an attached model's adapter brought."""
    attachment = getattr(model, ATTACHMENT, None)
    return None if attachment is None else attachment.lora


def write_adapter(folder: str | Path, config: AdapterConfig, state: dict[str, Tensor]) -> None:
    """Write an adapter folder through a temporary sibling, so that a full disk leaves the old one whole."""
    folder = Path(folder).resolve()
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_config(temporary, config)
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(folder: str | Path, config: AdapterConfig) -> None:
    """Replace an adapter's configuration and leave its tensors as they are."""
    temporary = Path(folder) / ".partial"
    temporary.mkdir(exist_ok=True)
    try:
        _write_config(temporary, config)
        (temporary / CONFIG_FILE).replace(Path(folder) / CONFIG_FILE)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_config(folder: Path, config: AdapterConfig) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def push_to_hub(folder: str | Path, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload an adapter folder to the Hugging Face hub; returns its address. Raises ValueError for a bad folder."""
    read_adapter(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)))


def read_adapter(name: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and tensors of an adapter folder or hub id. Raises ValueError for anything else."""
    folder = _folder(str(name))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"{name} is not an adapter: it has no {file}")
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"the adapter {name} is damaged ({error}); fetch or train it again") from None
    return _config(name, raw), state


def load_adapter(name: str, model: PreTrainedModel | PreTrainedConfig) -> LoadedAdapter:
    """Read an adapter (a folder or a hub id) for `model`, or for any model of a configuration.

    Raises ValueError where it is missing, damaged, or was trained for another model (naming both).
    """
    config, state = read_adapter(name)
    ours = base_shape(model)
    if config.base_shape != ours:
        raise ValueError(
            f"the adapter {name} was trained for {config.base_model_name_or_path} ({_shape(config.base_shape)}) "
            f"and the model is {_config_of(model).name_or_path or type(model).__name__} ({_shape(ours)})"
        )
    heads: dict[int, dict[str, Tensor]] = {}
    head_state: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = key.removeprefix(PREFIX).split(".")
        layer = next((int(p) for p in parts if p.isdigit()), None)
        if config.r and key.endswith((A, B)):
            lora[key.removeprefix(PREFIX)] = tensor
            continue
        if layer is None or parts[-2:] not in ([HEAD, "weight"], [HEAD, "bias"]):
            raise ValueError(f"the adapter {name} holds {key!r}, which is no eviction head")
        heads.setdefault(layer, {})[parts[-1]] = head_state[key.removeprefix(PREFIX)] = tensor
    kv_heads, hidden = ours["num_key_value_heads"], ours["hidden_size"]
    for layer, head in heads.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
        if shapes != {"weight": (kv_heads, hidden), "bias": (kv_heads,)}:
            raise ValueError(f"the adapter {name} is damaged: layer {layer} has {shapes}")
        if not all(torch.isfinite(tensor).all() for tensor in head.values()):
            raise ValueError(f"the adapter {name} is damaged: layer {layer} holds numbers that are not finite")
    if config.r and not lora:
        raise ValueError(f"the adapter {name} is damaged: its configuration names LoRA and it holds none")
    return LoadedAdapter(config=config, heads=heads, head_state=head_state, lora=lora)


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"{name} is a file; an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise ValueError(f"there is no adapter {name}: neither a folder here nor one that the hub gives") from None


def _config(name: str | Path, raw: Any) -> AdapterConfig:
    known = {f.name for f in fields(AdapterConfig)} | {"peft_type"}
    required = {"base_model_name_or_path", "base_shape", "window"}
    if not isinstance(raw, dict) or not required <= set(raw):
        raise ValueError(f"{name}/{CONFIG_FILE} is not sparsekv's: it needs {', '.join(sorted(required))}")
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ValueError(f"{name}/{CONFIG_FILE} has unknown keys: {', '.join(unknown)}; a newer sparsekv may know them")
    try:
        offsets = [(float(offset), float(ratio)) for offset, ratio in raw.get("offsets", [])]
    except (TypeError, ValueError):
        raise ValueError(f"{name}/{CONFIG_FILE}: offsets must be a list of [offset, compression ratio]") from None
    if any(a >= c or b >= d for (a, b), (c, d) in pairwise(offsets)):
        raise ValueError(f"{name}/{CONFIG_FILE}: offsets must ascend, both the offsets and the ratios")
    if not _fits(raw.get("ratios", {}), rows=len(offsets)):
        raise ValueError(f"{name}/{CONFIG_FILE}: ratios must hold, by length in tokens, one ratio for each of offsets")
    if type(raw["window"]) is not int or raw["window"] < 1 or raw.get("lag", 0) not in (0, 1, raw["window"]):
        raise ValueError(f"{name}/{CONFIG_FILE}: window must be an integer of at least 1, and lag 0, 1 or the window")
    try:
        neuron = None if raw.get("neuron") is None else NeuronSource(**raw["neuron"])
        kept = {key: value for key, value in raw.items() if key != "peft_type"}
        return AdapterConfig(**{**kept, "offsets": offsets, "neuron": neuron})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}/{CONFIG_FILE}: {error}") from None


def _fits(ratios: Any, *, rows: int) -> bool:
    return isinstance(ratios, dict) and all(
        key.isdigit()
        and isinstance(row, list)
        and len(row) == rows
        and all(isinstance(ratio, int | float) and ratio >= 1 for ratio in row)
        for key, row in ratios.items()
    )


def _shape(shape: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape.items())
