"""Shapes by name and from configurations."""

import pytest

from sparsekv.cost import ALIASES, SHAPES, shape_from_config, shape_of

CONFIG = {
    "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}  # fmt: skip


def test_a_configuration_and_a_name_are_one_shape():
    made = shape_from_config("Qwen/Qwen3-8B", CONFIG)
    assert made == shape_of("qwen3-8b")
    assert (made.name, made.context) == ("Qwen/Qwen3-8B", 40960)


def test_missing_heads_and_head_size_have_their_defaults():
    made = shape_from_config("x", {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "head_dim")})
    assert (made.kv_heads, made.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"sliding_window": None}, 0),
        ({"sliding_window": 4096}, 36),
        ({"sliding_window": 4096, "use_sliding_window": False}, 0),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 18}, 18),
        ({"sliding_window": 512, "layer_types": ["full_attention"] * 36}, 0),
    ],
)
def test_layers_with_a_window(changes, layers):
    made = shape_from_config("x", CONFIG | changes)
    assert made.window_layers == layers
    assert made.window == (changes["sliding_window"] if layers else 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"layer_types": ["linear_attention"] * 36}, "linear_attention"),
        ({"intermediate_size": None}, "no intermediate_size"),
    ],
)
def test_what_the_model_does_not_hold_for_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        shape_from_config("x", CONFIG | changes)


def test_names():
    assert all(shape_of(name) is SHAPES[target] for name, target in ALIASES.items())
    assert all(shape.name == name for name, shape in SHAPES.items())
    with pytest.raises(ValueError, match=r"'gpt-9'.*llama3\.1-8b"):
        shape_of("gpt-9")
