"""Which models attach can govern, and the sentence for those it cannot."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class AttentionLayers:
    """The attention modules of a decoder, in layer order."""

    modules: list[nn.Module]
    windows: list[int | None]
    """Per layer, the model's own sliding window, or None for full attention."""
    text_config: Any
    kv_heads: int
    group: int
    """Query heads per KV head."""
    head_dim: int

    @property
    def governed(self) -> list[int]:
        """The full-attention layers."""
        return [i for i, window in enumerate(self.windows) if window is None]

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def max_tokens(self) -> int:
        return self.text_config.max_position_embeddings

    def set_implementation(self, model: PreTrainedModel, name: str) -> None:
        """Switch the decoder, and only it, to an attention implementation."""
        for key in model.config.sub_configs:
            if getattr(model.config, key, None) is self.text_config:
                model.set_attn_implementation({key: name})
                return
        model.set_attn_implementation(name)


def attention_layers(model: PreTrainedModel) -> AttentionLayers:
    """Find the decoder's attention layers. Raises ValueError, naming the reason, where they cannot be governed."""
    name = type(model).__name__

    def refuse(reason: str) -> ValueError:
        return ValueError(f"sparsekv cannot attach to {name}: {reason}")

    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder, and only decoders are supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("its attention does not go through the Transformers attention interface")
    config = model.config.get_text_config(decoder=True)
    _check_config(config, refuse)
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and _attends(m)]
    modules.sort(key=lambda m: m.layer_idx)
    if any(getattr(m, "is_cross_attention", False) for m in modules):
        raise refuse("its layers attend to an encoder's output too, which no policy governs")
    if [m.layer_idx for m in modules] != list(range(config.num_hidden_layers)):
        raise refuse("some of its layers have no attention in a form that is known here, or more than one")
    if any(getattr(m, "sinks", None) is not None for m in modules):
        raise refuse("its attention has learned sinks")
    if not all(getattr(m, "is_causal", True) for m in modules):
        raise refuse("its attention is not causal")
    sizes = {_head_dim(m) for m in modules}
    groups = {getattr(m, "num_key_value_groups", 1) for m in modules}
    if 0 in sizes:
        raise refuse("its attention modules do not tell their head size")
    if len(sizes) != 1 or len(groups) != 1:
        raise refuse("its layers differ in head size or head count")
    (group,) = groups
    windows = [_window(config, i, refuse) for i in range(len(modules))]
    if None not in windows:
        raise refuse("every layer has a sliding window, so no layer holds more than that; set sliding_window=None")
    return AttentionLayers(
        modules=modules,
        windows=windows,
        text_config=config,
        kv_heads=config.num_attention_heads // group,
        group=group,
        head_dim=sizes.pop(),
    )


def _attends(module: nn.Module) -> bool:
    """As Transformers' attention modules say it: GPT-2, GPT-NeoX and OPT have no groups of query heads."""
    return hasattr(module, "num_key_value_groups") or hasattr(module, "is_causal")


def _head_dim(module: nn.Module) -> int:
    """0 where it is not told: under the names of Llama, GPT-NeoX and BERT."""
    names = ("head_dim", "head_size", "attention_head_size")
    return next((getattr(module, name) for name in names if hasattr(module, name)), 0)


def _check_config(config: Any, refuse: Any) -> None:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise refuse("its attention soft-caps the logits")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise refuse("its attention is latent (MLA): it has no keys per head to forget")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("some of its layers share the keys of others")
    if not getattr(config, "is_causal", True):
        raise refuse("its attention is not causal")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {r.get("rope_type") for r in rope.values() if isinstance(r, dict)}
    if "dynamic" in kinds:
        raise refuse("dynamic-NTK RoPE rotates stored keys anew as the text grows; set a fixed rope_type, such as yarn")


def _window(config: Any, layer: int, refuse: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    kind = kinds[layer] if kinds else ("sliding_attention" if sliding else "full_attention")
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and sliding:
        return sliding
    raise refuse(f"layer {layer} is of kind {kind!r}, and only full and sliding attention are supported")
