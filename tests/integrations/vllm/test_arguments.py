"""The arguments for vLLM, as keywords and as a command line; adapters and settings that it cannot run are refused
before it starts."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_model
from sparsekv.dms import NeuronSource
from sparsekv.integrations.vllm import engine_args, serve_arguments
from sparsekv.integrations.vllm.arguments import command_line
from sparsekv.integrations.vllm.settings import read_settings
from sparsekv.integrations.vllm.versions import refusal
from sparsekv.modeling.adapter import PREFIX, AdapterConfig, base_shape, write_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tmp_path: Path):
    """Writes an adapter for the tiny model, with whatever else it is to say."""

    def write(*, of: Any = None, extra: dict[str, torch.Tensor] | None = None, **config: Any) -> str:
        base = tiny_model() if of is None else of
        state = {}
        for layer in range(2):
            name = f"{PREFIX}model.layers.{layer}.self_attn.eviction_head"
            state |= {f"{name}.weight": torch.ones(2, 32), f"{name}.bias": torch.zeros(2)}
        if config.get("source") == "neuron":
            state = {}
        settings = {"base_model_name_or_path": "tiny", "base_shape": base_shape(base), "window": 4} | config
        write_adapter(tmp_path / "adapter", AdapterConfig(**settings), state | (extra or {}))
        return str(tmp_path / "adapter")

    return write


def test_keywords_say_all_that_the_plugin_needs(model, adapter):
    folder = adapter(offsets=[(-1.0, 2.0), (0.0, 4.0)])
    found = engine_args(model, adapter=folder, cr=3, tokens=512)
    assert found["model"] == model and found["load_format"] == "sparsekv"
    assert found["enable_prefix_caching"] is False and found["block_size"] == 32
    assert found["additional_config"] == {"sparsekv": {"adapter": folder, "cr": 3, "tokens": 512}}
    settings = read_settings(found["additional_config"])
    assert (settings.adapter, settings.cr, settings.tokens) == (folder, 3, 512)
    streaming = engine_args(model, policy="streaming", budget=64)
    assert streaming["additional_config"] == {"sparsekv": {"policy": "streaming", "budget": 64}}


def test_the_command_line_says_the_same(model, adapter):
    folder = adapter(offsets=[(-1.0, 2.0), (0.0, 4.0)])
    found = engine_args(model, adapter=folder, cr=3)
    words = serve_arguments(found)
    assert shlex.split(command_line(words)) == words
    assert words[0] == model and "--no-enable-prefix-caching" in words
    assert json.loads(words[words.index("--kv-transfer-config") + 1]) == found["kv_transfer_config"]
    assert json.loads(words[words.index("--additional-config") + 1]) == {"sparsekv": {"adapter": folder, "cr": 3}}


def test_adapters_that_vllm_cannot_run(model, adapter):
    other = tiny_model(num_hidden_layers=3)
    lora = {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    cases = [
        ({"of": other}, "was trained for tiny"),
        ({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "extra": lora}, "run `sparsekv convert merged"),
        ({"lag": 4}, "lag 4; vLLM runs lag 0 and 1"),
        ({"source": "neuron", "neuron": NeuronSource(), "policy": "dmc"}, "for policy 'dmc'"),
    ]
    for options, sentence in cases:
        folder = adapter(**options)
        with pytest.raises(ValueError, match=re.escape(sentence)):
            engine_args(model, adapter=folder)
    with pytest.raises(ValueError, match="is not an adapter"):
        engine_args(model, adapter=model)
    with pytest.raises(ValueError, match="there is no model"):
        engine_args(model + "-nowhere", adapter=adapter())
    assert engine_args(model, adapter=adapter(source="neuron", neuron=NeuronSource()))


def test_ratios_beyond_the_table(model, adapter):
    folder = adapter(offsets=[(-1.0, 2.0), (0.0, 4.0)])
    with pytest.raises(ValueError, match="holds up to 4"):
        engine_args(model, adapter=folder, cr=9)
    with pytest.raises(ValueError, match="no table of ratios"):
        engine_args(model, adapter=adapter(), cr=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "pass adapter="),
        ({"policy": "tova", "budget": 5}, "it can be 'dms'"),
        ({"policy": "streaming"}, "needs budget="),
        ({"policy": "streaming", "budget": 3}, "leaves no recent window"),
        ({"policy": "streaming", "budget": 9, "cr": 2}, "no adapter, cr or tokens"),
        ({"adapter": "x", "budget": 9}, "no budget"),
        ({"adapter": "x", "tokens": 9}, "pass cr="),
        ({"adapter": "x", "trusted_ratio": 0.5}, "use 1 or more"),
    ],
)
def test_settings_that_do_not_fit_each_other(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine_args(model, **options)


@pytest.mark.parametrize("raw", [None, {}, {"sparsekv": None}])
def test_a_load_format_without_settings_is_refused(raw):
    with pytest.raises(ValueError, match="sparsekv vllm-args"):
        read_settings(raw)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown keys: ratio"):
        read_settings({"sparsekv": {"adapter": "x", "ratio": 2}})


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0", "dev"])
def test_other_versions_of_vllm_are_refused(version):
    assert version in (refusal(version) or "") and "install such a vLLM" in (refusal(version) or "")
    assert refusal("0.26.0+cpu") is refusal("0.26.1") is None
