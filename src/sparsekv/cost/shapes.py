"""The sizes of a decoder that decide what a step costs: named ones, and those of a Transformers configuration.

A dense decoder with a gated MLP (three matrices), grouped heads and one output matrix; norms, biases and eviction heads
(under 0.1 % of the weights) are left out. The named sizes are those of the models' published config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Equal where the sizes are, whatever the name. `context` is the longest the model was made for, in tokens."""

    name: str = field(compare=False)
    layers: int
    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Input embedding and output matrix are one."""
    context: int = field(compare=False)
    window_layers: int = 0
    """Of the layers, those that attend to a sliding window; no policy governs them."""
    window: int = 0
    """Tokens of that window."""

    @property
    def d_q(self) -> int:
        """Width of the queries; d in the models of the paper."""
        return self.heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim


_NAMED = [
    ModelShape(
        name="llama3.1-8b", layers=32, d=4096, d_ff=14336, heads=32, kv_heads=8, head_dim=128,
        vocab=128256, tied=False, context=131072,
    ),
    ModelShape(
        name="llama3.1-70b", layers=80, d=8192, d_ff=28672, heads=64, kv_heads=8, head_dim=128,
        vocab=128256, tied=False, context=131072,
    ),
    ModelShape(
        name="llama3.2-1b", layers=16, d=2048, d_ff=8192, heads=32, kv_heads=8, head_dim=64,
        vocab=128256, tied=True, context=131072,
    ),
    ModelShape(
        name="qwen3-8b", layers=36, d=4096, d_ff=12288, heads=32, kv_heads=8, head_dim=128,
        vocab=151936, tied=False, context=40960,
    ),
    ModelShape(
        name="qwen2.5-1.5b", layers=28, d=1536, d_ff=8960, heads=12, kv_heads=2, head_dim=128,
        vocab=151936, tied=True, context=32768,
    ),
    ModelShape(
        name="qwen2.5-7b", layers=28, d=3584, d_ff=18944, heads=28, kv_heads=4, head_dim=128,
        vocab=152064, tied=False, context=32768,
    ),
    ModelShape(
        name="qwen2.5-32b", layers=64, d=5120, d_ff=27648, heads=40, kv_heads=8, head_dim=128,
        vocab=152064, tied=False, context=32768,
    ),
    ModelShape(
        name="smollm2-135m", layers=30, d=576, d_ff=1536, heads=9, kv_heads=3, head_dim=64,
        vocab=49152, tied=True, context=8192,
    ),
]  # fmt: skip

SHAPES = {shape.name: shape for shape in _NAMED}
"""Name -> sizes. `qwen-r1-*` are the distillations of DeepSeek-R1: Qwen2.5's sizes, and no tied embedding at 1.5B."""
for _size in ("1.5b", "7b", "32b"):
    _name = f"qwen-r1-{_size}"
    SHAPES[_name] = replace(SHAPES[f"qwen2.5-{_size}"], name=_name, tied=False, context=131072)

ALIASES = {"llama-3.1-8b": "llama3.1-8b", "llama-3.2-1b": "llama3.2-1b"}
"""Other spellings, such as those of sparsekv.bench."""


def shape_of(name: str) -> ModelShape:
    """The sizes of that name. Raises ValueError for an unknown one."""
    known = ALIASES.get(name, name)
    if known not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}")
    return SHAPES[known]


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """From the values of a Transformers configuration (of the text part, where a model has several).

    Raises ValueError where a size is missing, or the cost model does not hold: experts, latent vectors, linear layers.
    """

    def size(key: str, default: Any = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"the configuration of {name} has no {key}; plan needs a decoder's config.json with it")
        return value

    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (config.get(key) or 0) > 1:
            raise ValueError(f"{name} is a mixture of experts ({key}); the cost model holds for dense models: name one")
    if config.get("kv_lora_rank"):
        raise ValueError(f"{name} caches latent vectors; the cost model holds for plain keys and values: name another")
    layers, d, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
    kinds = _kinds(name, config, layers=layers)
    return ModelShape(
        name=name,
        layers=layers,
        d=d,
        d_ff=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", d // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        context=size("max_position_embeddings"),
        window_layers=kinds.count("sliding_attention"),
        window=size("sliding_window") if "sliding_attention" in kinds else 0,
    )


def _kinds(name: str, config: Mapping[str, Any], *, layers: int) -> list[str]:
    """The kind of attention of each layer, full or sliding."""
    sliding = config.get("sliding_window") and config.get("use_sliding_window", True)
    kinds = list(config.get("layer_types") or ["sliding_attention" if sliding else "full_attention"] * layers)
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(
            f"{name} has layers of {', '.join(other)}; the cost model holds for full and sliding attention: "
            "name another"
        )
    return kinds
