"""What vLLM may be asked for and the plugin cannot do is refused before any weight is read, with the way out."""

import copy
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention

from engines import engine
from sparsekv.dms import NeuronSource
from sparsekv.integrations.vllm import engine_args
from sparsekv.integrations.vllm.refusals import check_config, check_layer
from sparsekv.integrations.vllm.worker.neuron import wrap_rope


def config_of(made: Any, **options: Any) -> Any:
    arguments = engine_args(made.model, adapter=made.adapter) | {"dtype": "float32", "max_model_len": 256} | options
    return EngineArgs(**arguments).create_engine_config()


@pytest.fixture(scope="module")
def config(made):
    """One that is not refused."""
    found = config_of(made("Llama"))
    check_config(found)
    return found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enable_prefix_caching": True}, "pass --no-enable-prefix-caching"),
        ({"block_size": 64}, "pass --block-size 32"),
        ({"kv_transfer_config": None}, "the KV connector is None"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "the KV connector is ExampleConnector, .*no other connector beside it",
        ),
        ({"kv_transfer_config": {"kv_connector": "MultiConnector", "kv_role": "kv_both"}}, "KV connector is Multi"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "leave out --speculative-config"),
    ],
)
def test_arguments(made, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(config_of(made("Llama"), **options))


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("parallel_config.decode_context_parallel_size", 2, "use --tensor-parallel-size"),
        ("parallel_config.prefill_context_parallel_size", 2, "use --tensor-parallel-size"),
        ("parallel_config.enable_dbo", True, "leave out --enable-dbo"),
        ("cache_config.cache_dtype", "fp8", "leave out --kv-cache-dtype"),
        ("cache_config.kv_offloading_size", 1.0, "leave out --kv-offloading-size"),
        ("cache_config.kv_sharing_fast_prefill", True, "leave out --kv-sharing-fast-prefill"),
        ("model_config.enable_sleep_mode", True, "leave out --enable-sleep-mode"),
        ("model_config.runner_type", "pooling", "only decoders that generate"),
    ],
)
def test_settings_that_a_cpu_cannot_have(config, where, value, sentence):
    """vLLM itself refuses most of them on a CPU, so they are set on a configuration that it made."""
    changed = copy.deepcopy(config)
    section, name = where.split(".")
    assert hasattr(getattr(changed, section), name)
    setattr(getattr(changed, section), name, value)
    with pytest.raises(ValueError, match=sentence):
        check_config(changed)


def test_latent_attention(config, tmp_path):
    DeepseekV2Config(num_hidden_layers=1, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    changed = copy.deepcopy(config)
    changed.model_config = EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, dtype="float32"
    ).create_model_config()
    assert changed.model_config.use_mla
    with pytest.raises(ValueError, match="MLA"):
        check_config(changed)


def test_the_models_own_type_may_be_named(made):
    check_config(config_of(made("Llama"), dtype="bfloat16", kv_cache_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"per_layer_sliding_window": 64}, "has a sliding window of 64"),
        ({"logits_soft_cap": 30.0}, "caps its scores"),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "of type encoder_only"),
    ],
)
def test_layers(config, options, sentence):
    with set_current_vllm_config(copy.deepcopy(config)):
        check_layer("plain", Attention(4, 32, 0.2, num_kv_heads=2, prefix="0.plain"))
        layer = Attention(4, 32, 0.2, num_kv_heads=2, prefix="0.attn", **options)
    with pytest.raises(ValueError, match=f"layer 0.attn .*{sentence}.*serve this model with"):
        check_layer("0.attn", layer)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("has_sink", True, "attention sinks"),
        ("kv_sharing_target_layer_name", "0.attn", "shares the cache of 0.attn"),
        ("head_size_v", 64, "values of size 64"),
        ("use_mm_prefix", True, "both ways within images"),
    ],
)
def test_layers_that_no_backend_of_a_cpu_has(config, name, value, sentence):
    with set_current_vllm_config(copy.deepcopy(config)):
        layer = Attention(4, 32, 0.2, num_kv_heads=2, prefix="0.attn")
    assert hasattr(layer, name)
    setattr(layer, name, value)
    with pytest.raises(ValueError, match=sentence):
        check_layer("0.attn", layer)


@pytest.mark.parametrize("kind", [ChunkedLocalAttention, MLAAttention])
def test_layers_of_another_class(kind):
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    with pytest.raises(ValueError, match=f"is {kind.__name__}, not plain attention"):
        check_layer("0.attn", layer)


def test_queries_that_carry_no_logits():
    parent, options = torch.nn.Module(), {"kv_heads": 2, "head_dim": 16, "place": [None]}
    with pytest.raises(ValueError, match=r"Module has no rotary_emb.*use --model-impl vllm"):
        wrap_rope(parent, NeuronSource(), **options)
    parent.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="channel 16 and query heads have 16"):
        wrap_rope(parent, NeuronSource(channel=16), **options)


def test_an_engine_is_refused_before_it_loads(made):
    """All the way through vLLM: a pool that cannot hold one sequence, and an argument that is refused."""
    llama = made("Llama")
    with pytest.raises(ValueError, match="prefix caching shares blocks"), engine(llama, enable_prefix_caching=True):
        pass
    with pytest.raises(ValueError, match="KV cache"), engine(llama, num_gpu_blocks_override=8):
        pass
