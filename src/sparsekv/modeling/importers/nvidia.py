"""Checkpoints of NVIDIA's DMS code (Model-Optimizer, experimental/dms) as adapters.

Two sources, told apart by the tensors. In both the logit of token k + 1 decides token k (lag 1), and dms_window_size W
means that q - k <= W is visible (window W + 1).

trained heads   dms_proj_alpha.weight W [kv_heads, hidden_size] and dms_proj_alpha_norm.weight g_a [hidden_size]:
                z = scale * (W RMSNorm(x) g_a + bias) - shift on the residual stream x before the layer's input norm.
                That norm is h = RMSNorm(x) g_in with the same epsilon, so the heads fold into linear ones on h:
                W' = scale * W diag(g_a / g_in), b' = scale * bias - shift.
none            the neuron source: z = scale * q - shift, q the last channel of the first query head of each group
                after the query norm; zeroed before and after RoPE. The adapter then holds no tensors.

Trained heads come as a whole model, alone, or in raw trainer files (every name begins with `student_model.`).
"""

from typing import Any

import torch
import yaml
from torch import Tensor

from sparsekv.dms import NeuronSource
from sparsekv.modeling.adapter import HEAD, PREFIX, AdapterConfig
from sparsekv.modeling.importers.foreign import Checkpoint, Settings

_TRAINER = "student_model."
_HEADS = "dms_proj_alpha"


def convert_nvidia(src: str, base: str | None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter, and its tensors by name. base: the model that the heads were trained on, where src is not whole.

    Raises ValueError for a checkpoint that is damaged, truncated or not NVIDIA's, and where a base is missing.
    """
    checkpoint = Checkpoint(src)
    raw = _settings(checkpoint)
    trained = any(f".{_HEADS}." in name for name in checkpoint.names)
    if not raw and not trained:
        raise ValueError(f"{src} is not a DMS checkpoint of NVIDIA's: no dms_window_size and no {_HEADS} tensors")
    if not raw:
        raise ValueError(
            f"{src} does not say how its heads are to be read: put the config.json or config.yaml of its training, "
            "which gives dms_window_size, beside it"
        )
    settings = Settings.read(src, raw)
    training = {"imported_from": src, "code": "NVIDIA Model-Optimizer experimental/dms", "cr": settings.ratio}
    per_layer = raw.get("alpha_per") == "layer"
    if trained:
        base_name, shape, state = _fold_heads(checkpoint, settings, base=base, per_layer=per_layer)
        neuron = None
    else:
        if base is not None:
            raise ValueError(
                f"the decisions of {src} live in its own queries: it is its own base model, leave out base"
            )
        if raw.get("separate_alpha"):
            raise ValueError(f"{src} is truncated: its configuration speaks of {_HEADS} tensors, and it has none")
        if per_layer:
            raise ValueError(f"{src} decides once per layer from its queries (dms_alpha_per), which is not supported")
        base_name, shape, state = src, checkpoint.shape(), {}
        neuron = neuron_of(checkpoint, settings, rezero=True)
    config = AdapterConfig(
        base_model_name_or_path=base_name,
        base_shape=shape,
        window=settings.window,
        lag=1,
        source="linear" if neuron is None else "neuron",
        neuron=neuron,
        training=training,
    )
    return config, state


def neuron_of(checkpoint: Checkpoint, settings: Settings, *, rezero: bool) -> NeuronSource:
    """The neuron source of a whole model. Raises ValueError where the queries of a layer are missing."""
    for layer in range(checkpoint.shape()["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        if name not in checkpoint.names:
            raise ValueError(f"{checkpoint.name} is truncated: it has no {name}")
    return NeuronSource(channel=-1, scale=settings.scale, offset=-settings.shift, rezero=rezero)


def fold(
    weight: Tensor, norm: Tensor, input_norm: Tensor, *, bias: Tensor | None, scale: float, shift: float
) -> tuple[Tensor, Tensor]:
    """W' = scale * W diag(g_a / g_in), b' = scale * bias - shift, float32.

    weight: [kv_heads, hidden_size]; norm, input_norm: [hidden_size]; bias: [kv_heads] or None.
    """
    ratio = torch.where(norm == 0, 0.0, norm.double() / input_norm.double())
    folded = scale * weight.double() * ratio
    offset = torch.zeros(len(weight)) if bias is None else bias
    return folded.float(), (scale * offset.double() - shift).float()


def _fold_heads(
    checkpoint: Checkpoint, settings: Settings, *, base: str | None, per_layer: bool
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(base model, its shape, tensors by name)."""
    model = None if base is None else Checkpoint(base)
    prefix = _TRAINER if any(name.startswith(_TRAINER) for name in checkpoint.names) else ""
    if prefix and model is None:
        raise ValueError(
            f"{checkpoint.name} holds raw trainer files, which no model loads from: pass the model that it was "
            "trained from as base (--base)"
        )
    shape = (model or checkpoint).shape()
    layers, heads, hidden = (shape[key] for key in ("num_hidden_layers", "num_key_value_heads", "hidden_size"))
    if model is not None:
        surplus = f"{prefix}model.layers.{layers}.self_attn.{_HEADS}.weight" in checkpoint.names
        if surplus or checkpoint.config and checkpoint.shape() != shape:
            raise ValueError(f"{checkpoint.name} was not trained from {base}: it is of another size")
    state: dict[str, Tensor] = {}
    for layer in range(layers):
        part = f"{prefix}model.layers.{layer}.self_attn.{_HEADS}"
        weight = checkpoint.tensor(f"{part}.weight", (heads, hidden))
        norm = checkpoint.tensor(f"{part}_norm.weight", (hidden,))
        bias = checkpoint.tensor(f"{part}.bias", (heads,)) if f"{part}.bias" in checkpoint.names else None
        if per_layer:
            weight = weight[:1].expand_as(weight)
            bias = None if bias is None else bias[:1].expand_as(bias)
        name = f"model.layers.{layer}.input_layernorm.weight"
        input_norm = _input_norm(checkpoint, model, name, prefix=prefix, size=hidden)
        folded = fold(weight, norm, input_norm, bias=bias, scale=settings.scale, shift=settings.shift)
        if not all(tensor.isfinite().all() for tensor in folded):
            raise ValueError(f"{checkpoint.name} cannot be folded: layer {layer} has NaN, infinity or a zeroed norm")
        name = f"{PREFIX}model.layers.{layer}.self_attn.{HEAD}"
        state[f"{name}.weight"], state[f"{name}.bias"] = folded
    return base or checkpoint.name, shape, state


def _input_norm(checkpoint: Checkpoint, model: Checkpoint | None, name: str, *, prefix: str, size: int) -> Tensor:
    """The weight of a layer's input norm, from the checkpoint if it is whole, else from the base model."""
    own = checkpoint.tensor(prefix + name, (size,)) if prefix + name in checkpoint.names else None
    if model is None:
        if own is None:
            raise ValueError(
                f"{checkpoint.name} holds the eviction heads alone, and folding them needs the input norms of the "
                "model that they were trained on: pass it as base (--base)"
            )
        return own
    theirs = model.tensor(name, (size,))
    if own is not None and not torch.equal(own.bfloat16(), theirs.bfloat16()):
        raise ValueError(
            f"{checkpoint.name} was not trained from {model.name}, or not with its weights frozen: {name} differs"
        )
    return theirs


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """NVIDIA's settings without their dms_: from config.json, else from the trainer's config.yaml, beside or above."""
    raw = {key.removeprefix("dms_"): value for key, value in checkpoint.config.items() if key.startswith("dms_")}
    for folder in () if raw else (checkpoint.folder, checkpoint.folder.resolve().parent):
        file = folder / "config.yaml"
        if not raw and file.is_file():
            try:
                parsed = yaml.safe_load(file.read_text())
            except (yaml.YAMLError, UnicodeDecodeError):
                raise ValueError(f"{file} is not YAML, and {checkpoint.name} says nothing of its settings") from None
            section = parsed.get("dms") if isinstance(parsed, dict) else None
            raw = {key.removeprefix("dms_"): value for key, value in (section or {}).items()}
            raw.setdefault("cr", raw.get("final_cr"))
    if "initial_alpha_offset" in raw:
        raw["alpha_offset"] = raw["initial_alpha_offset"]
    return raw
