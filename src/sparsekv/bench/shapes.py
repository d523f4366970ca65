"""Model shapes for benchmarks with random weights: speed does not depend on what the weights say."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that decide speed."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    family: Callable[..., PreTrainedConfig]

    def config(self, context: int) -> PreTrainedConfig:
        """The Transformers configuration of this shape with room for `context` tokens."""
        return self.family(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=context,
            tie_word_embeddings=self.tied,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        heads = 2 * (self.query_heads + self.kv_heads) * self.head_dim
        return self.hidden * (heads + 3 * self.intermediate)

    def kv_bytes(self, element_size: int = 2) -> int:
        """Bytes of one token's keys and values over all layers and heads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_size


_SHAPES = [
    Shape(
        name="qwen3-8b",
        layers=36,
        hidden=4096,
        intermediate=12288,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=151936,
        tied=False,
        family=Qwen3Config,
    ),
    Shape(
        name="llama-3.2-1b",
        layers=16,
        hidden=2048,
        intermediate=8192,
        query_heads=32,
        kv_heads=8,
        head_dim=64,
        vocabulary=128256,
        tied=True,
        family=LlamaConfig,
    ),
    Shape(
        name="smollm2-135m",
        layers=30,
        hidden=576,
        intermediate=1536,
        query_heads=9,
        kv_heads=3,
        head_dim=64,
        vocabulary=49152,
        tied=True,
        family=LlamaConfig,
    ),
    Shape(
        name="tiny",
        layers=2,
        hidden=64,
        intermediate=128,
        query_heads=4,
        kv_heads=2,
        head_dim=64,
        vocabulary=256,
        tied=True,
        family=LlamaConfig,
    ),
]


def shape_of(name: str) -> Shape:
    """The Shape of that name. Raises ValueError for an unknown one."""
    for shape in _SHAPES:
        if shape.name == name:
            return shape
    raise ValueError(f"unknown shape {name!r}; use one of {', '.join(s.name for s in _SHAPES)}")
