"""What a run leaves for use: the adapter's folder and, where all weights were trained, a plain model in it.

folder/ adapter_config.json, adapter_model.safetensors   heads, and LoRA in PEFT's format
        model/                                            trainable: all, and merged exports
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv.assets.embedded import resolve_model
from sparsekv.modeling.adapter import HEAD, PREFIX, AdapterConfig, load_adapter, write_adapter
from sparsekv.modeling.lora import MergedLora
from sparsekv.retrofit.training.checkpoint import reason
from sparsekv.retrofit.training.peft import peft_name

MODEL_FOLDER = "model"
STUDENT = "student."
"""The prefix of the student's parameters in a Distillation."""


def export(weights: dict[str, Tensor], base: str, *, folder: Path, adapter: AdapterConfig) -> None:
    """Write an adapter folder from what was trained, by the names of a Distillation's parameters.

    Heads are kept in float32 and LoRA in float16. Other weights make a plain model of the base's dtype in folder/model,
    which the adapter then names as its base.
    """
    own = {peft_name(n.removeprefix(STUDENT)): tensor for n, tensor in weights.items() if n.startswith(STUDENT)}
    heads = {name: tensor.float() for name, tensor in own.items() if f".{HEAD}." in name}
    lora = {name: tensor.half() for name, tensor in own.items() if ".lora_" in name}
    rest = {name: tensor for name, tensor in own.items() if name not in heads and name not in lora}
    if rest:
        write_model(base, rest, folder / MODEL_FOLDER)
        adapter = replace(adapter, base_model_name_or_path=str(folder / MODEL_FOLDER))
    write_adapter(folder, adapter, {PREFIX + name: tensor.contiguous() for name, tensor in (heads | lora).items()})


def export_merged(base: str, adapter: str, folder: Path) -> AdapterConfig:
    """Write a plain Transformers model with an adapter's LoRA merged in, and its heads beside it; the base's files and
    the adapter's are left as they are. Returns the new adapter's configuration.

    Raises ValueError for an adapter without LoRA or of another model, or a folder that is not empty or cannot be
    written, which is then as it was.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    model = _plain(base)
    loaded = load_adapter(adapter, model)
    if not loaded.lora:
        raise ValueError(f"the adapter {adapter} has no LoRA to merge: use it with its base model as it is")
    MergedLora(model, loaded.lora, scale=loaded.config.lora_alpha / loaded.config.r).put_in()
    config = replace(
        loaded.config, base_model_name_or_path=str(folder / MODEL_FOLDER), r=0, lora_alpha=0, target_modules=[]
    )
    partial = folder.with_name(folder.name + ".partial")
    try:
        _save(model, base, partial / MODEL_FOLDER)
        write_adapter(partial, config, {PREFIX + name: tensor for name, tensor in loaded.head_state.items()})
        partial.replace(folder)  # over an empty one
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {folder} ({reason(error)}); make room there, or name another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def write_model(base: str, weights: dict[str, Tensor], folder: Path) -> None:
    """A plain model: the base's configuration, tokenizer and dtype with other weights."""
    model = _plain(base)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"weights that {base} does not have: {unknown[:3]}"
    _save(model, base, folder)


def _plain(base: str) -> Any:
    with torch.device("cpu"):
        return AutoModelForCausalLM.from_pretrained(resolve_model(base), dtype="auto")


def _save(model: Any, base: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model(base)).save_pretrained(folder)
