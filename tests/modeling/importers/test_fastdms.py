"""FastDMS's checkpoints, synthetic and small, against its formulas written out."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sparsekv
from helpers import tiny_model, tokens
from sparsekv.dms import NeuronSource
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.importers import convert
from written_out import Neuron, decoder

W = 3
"""FastDMS's window_size."""
METADATA = {"window_size": W, "alpha_scale": 80.0, "alpha_offset": 4.0, "target_cr": 8, "context_len": 4096}


def save(folder, family="Llama", **config):
    """A whole model without any settings; returns (folder, config, tensors)."""
    model = tiny_model(family, **config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, model.config, state


def load(config, adapter):
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float64)
    sparsekv.attach(model, adapter=str(adapter))
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_equals_the_formula(family, tmp_path):
    src, model_config, state = save(tmp_path / "run" / "final", family)
    (src.parent / "training_log.json").write_text(json.dumps({"config": METADATA, "log": []}))
    config = convert("fastdms", str(src), dst=tmp_path / "adapter")
    assert (config.source, config.lag, config.window, config.training["cr"]) == ("neuron", 0, W + 1, 8)
    assert config.neuron == NeuronSource(channel=-1, scale=80.0, offset=-4.0, rezero=False)
    assert read_adapter(tmp_path / "adapter") == (config, {})
    ids, source = tokens(1, 33)[0], Neuron(scale=80, shift=4, rezero=False)
    want = decoder(model_config, state, ids, window=W + 1, lag=0, source=source)
    assert 0.2 < want.marks.double().mean() < 0.8 and want.z.abs().min() > 1e-3
    model = load(config, tmp_path / "adapter")
    trace = sparsekv.inspect(model, ids[None])
    assert torch.equal(trace.marks, want.marks)
    torch.testing.assert_close(trace.logits.double(), want.z, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        cache = sparsekv.SparseCache(model, page_size=2)
        pieces = [model(piece[None], past_key_values=cache).logits[0] for piece in ids.split([20] + [1] * 13)]
    torch.testing.assert_close(torch.cat(pieces), want.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_marked_token_is_seen_for_as_long_as_fastdms_says(tmp_path):
    """q - k <= W, seen from outside: with one layer and everything marked, token 0 moves the outputs up to W."""
    src, *_ = save(tmp_path / "final", num_hidden_layers=1)
    (src / "dms_metadata.json").write_text(json.dumps({**METADATA, "alpha_offset": -1e4}))
    config = convert("fastdms", str(src), dst=tmp_path / "adapter")
    model, ids = load(config, tmp_path / "adapter"), tokens(1, 12)
    other = torch.cat([ids[:, :1] % 60 + 1, ids[:, 1:]], 1)
    a, b = (model(x, past_key_values=sparsekv.SparseCache(model)).logits[0] for x in (ids, other))
    assert (a != b).any(-1).tolist() == [q <= W for q in range(12)]


def test_settings_beside_the_weights_win(tmp_path):
    src, *_ = save(tmp_path / "run" / "final")
    raw = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**raw, "dms_window_size": 512}))
    found = [convert("fastdms", str(src), dst=tmp_path / "adapter").window]
    (src.parent / "training_log.json").write_text(json.dumps({"config": {"window_size": 256}}))
    found.append(convert("fastdms", str(src), dst=tmp_path / "adapter").window)
    (src / "dms_metadata.json").write_text(json.dumps({"window_size": 128}))
    found.append(convert("fastdms", str(src), dst=tmp_path / "adapter").window)
    assert found == [513, 257, 129]


def test_refusals(tmp_path):
    src, _, state = save(tmp_path / "final")

    def refuse(sentence, **options):
        with pytest.raises(ValueError, match=sentence):
            convert("fastdms", str(src), dst=tmp_path / "adapter", **options)
        assert not list(tmp_path.glob("adapter*"))

    refuse("is not a checkpoint of FastDMS")
    (src / "dms_metadata.json").write_text('{"window')
    refuse("dms_metadata.json is damaged")
    (src / "dms_metadata.json").write_text(json.dumps(METADATA))
    refuse("leave out base", base=str(src))
    del state["model.layers.1.self_attn.q_proj.weight"]
    save_file(state, src / "model.safetensors")
    refuse("is truncated: it has no model.layers.1.self_attn.q_proj.weight")
    state["model.layers.1.self_attn.dms_proj_alpha.weight"] = torch.zeros(2, 32)
    save_file(state, src / "model.safetensors")
    refuse("convert it as nvidia")
    (src / "model.safetensors").write_bytes(b"")
    refuse("is damaged: model.safetensors cannot be read")
