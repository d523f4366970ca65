"""The neuron source: where the logits come from, what the queries lose, and that nothing of it stays behind."""

import json
import sys

import pytest
import torch

import sparsekv
from helpers import FAMILIES, tiny_model, tokens
from sparsekv.dms import NeuronSource
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import AdapterConfig, base_shape, read_adapter, save_adapter
from written_out import Neuron, Written, decoder

WINDOW = 4
LOUD = {"scale": 5.0, "offset": -0.3}
"""Marks about half of all tokens of a tiny model."""


def attached(family, *, lag=0, **neuron):
    model = tiny_model(family, dtype=torch.float64)
    sparsekv.attach(model, policy="dms", window=WINDOW, lag=lag, neuron=NeuronSource(**{**LOUD, **neuron}))
    return model


def written(model, ids, *, lag=0, rezero=True) -> Written:
    source = Neuron(scale=LOUD["scale"], shift=-LOUD["offset"], rezero=rezero)
    return decoder(model.config, model.state_dict(), ids, window=WINDOW, lag=lag, source=source)


@torch.no_grad()
def through_cache(model, ids, chunks, mask=None):
    """[rows, S, vocab], the text fed in pieces. Positions count from each row's first token, as in `generate`: what is
    left of the queries after the second zeroing depends on them."""
    cache, out, start = sparsekv.SparseCache(model, page_size=4), [], 0
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for end in torch.tensor(chunks).cumsum(0).tolist():
        piece = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        out.append(model(ids[:, start:end], past_key_values=cache, **piece).logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(out, 1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("rezero", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_equals_the_formulas_written_out(family, rezero, lag):
    model, ids = attached(family, lag=lag, rezero=rezero), tokens(1, 29)
    want = written(model, ids[0], lag=lag, rezero=rezero)
    assert 0.2 < want.marks.double().mean() < 0.8 and want.z.abs().min() > 1e-4, "the test must decide clearly"
    trace = sparsekv.inspect(model, ids)
    assert torch.equal(trace.marks, want.marks)
    decided = slice(None, 29 - lag)
    torch.testing.assert_close(trace.logits[..., decided].double(), want.z[..., lag:], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits[0], want.logits, atol=1e-4, rtol=1e-4)
    for chunks in ([29], [13, 16], [20] + [1] * 9):
        torch.testing.assert_close(through_cache(model, ids, chunks)[0], want.logits, atol=1e-4, rtol=1e-4)


def test_rezero_makes_a_difference():
    model, ids = attached("Llama"), tokens(1, 12)[0]
    with_it, without = (written(model, ids, rezero=rezero).logits for rezero in (True, False))
    assert (with_it - without).abs().max() > 1e-2


@pytest.mark.parametrize("length", [4, 11], ids=["as many tokens as heads", "more tokens than heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_queries_that_rope_gets_in_every_family(family, length, monkeypatch):
    """The oracle: a plain model whose RoPE function notes the channel and zeroes it on both sides. Nothing is marked,
    so attention is dense."""
    plain, ids = tiny_model(family, dtype=torch.float64), tokens(2, length)
    code = sys.modules[type(plain).__module__]
    noted, rope = [], code.apply_rotary_pos_emb

    def spy(query, key, *args, **kwargs):
        noted.append(query[:, ::2, :, 3].transpose(1, 2))
        query = query.clone()
        query[:, ::2, :, 3] = 0
        query, key = rope(query, key, *args, **kwargs)
        query[:, ::2, :, 3] = 0
        return query, key

    governed = [i for i, m in enumerate(plain.model.layers) if not getattr(m.self_attn, "sliding_window", None)]
    spied = [spy if i in governed else rope for i in range(2)]
    monkeypatch.setattr(code, "apply_rotary_pos_emb", lambda *a, **k: spied[calls.pop(0)](*a, **k))
    calls = [0, 1]
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
    monkeypatch.undo()

    model = tiny_model(family, dtype=torch.float64)
    attachment = sparsekv.attach(model, policy="dms", neuron=NeuronSource(channel=3, scale=1.0, offset=-100.0))
    read = []
    logits = attachment.policy.logits
    monkeypatch.setattr(attachment.policy, "logits", lambda i, h: read.append(logits(i, h)) or read[-1])
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert len(read) == len(noted) == len(governed) >= 1
    for z, q in zip(read, noted, strict=True):
        torch.testing.assert_close(z, (q.flatten(0, 1).float() - 100), atol=2e-5, rtol=0)


def test_only_the_first_query_head_of_each_group_loses_the_channel(monkeypatch):
    model, seen = attached("Qwen3", rezero=True), []
    monkeypatch.setattr("sparsekv.attend.whole.gate", lambda q, k, v, *a, **b: seen.append(q) or torch.zeros_like(q))
    with torch.no_grad():
        model(tokens(1, 6), use_cache=False)
    for query in seen:
        zero = (query == 0).all(2)[0]
        assert zero.nonzero().tolist() == [[0, 7], [2, 7]]


def test_a_padded_row_equals_the_text_alone():
    model, ids = attached("Qwen3", lag=1), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    together = through_cache(model, ids, [18, 1, 1, 1, 1, 1, 1], mask)
    alone = through_cache(model, ids[:1, 7:], [11, 1, 1, 1, 1, 1, 1])
    torch.testing.assert_close(together[0, 7:], alone[0], atol=1e-9, rtol=0)


def test_the_memory_shrinks():
    model = attached("Llama", offset=100.0)
    cache = sparsekv.SparseCache(model, page_size=4)
    with torch.no_grad():
        model(tokens(1, 40), past_key_values=cache)
    assert cache.stats().tokens_held == WINDOW


def test_training_reaches_the_weights_of_the_channel():
    model, ids = tiny_model("Llama").train(), tokens(2, 16)
    sparsekv.attach(model, policy="dms", window=WINDOW, neuron=NeuronSource(**LOUD))
    with contexts.soft(model, tau=0.5, seed=0) as gates:
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert [tuple(gate.shape) for gate in gates.gates.values()] == [(32, 2)] * 2
    for layer in model.model.layers:
        grad = layer.self_attn.q_proj.weight.grad.view(4, 8, 32)
        assert grad.isfinite().all() and grad[[0, 2], 7].abs().sum(-1).min() > 0


def test_eviction_off_leaves_the_channel_out():
    model, ids = attached("Llama"), tokens(1, 20)
    source = Neuron(scale=0.0, shift=1.0)
    want = decoder(model.config, model.state_dict(), ids[0], window=WINDOW, source=source).logits
    with torch.no_grad(), contexts.dense(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
@torch.no_grad()
def test_detach_restores_the_model(family):
    model, ids = tiny_model(family), tokens(1, 12)
    before = model(ids).logits
    sparsekv.attach(model, policy="dms", neuron=NeuronSource())
    assert not torch.equal(model(ids, use_cache=False).logits, before)
    sparsekv.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_adapter_without_tensors_brings_it_back(tmp_path):
    model, ids = attached("Qwen3", lag=1, rezero=False), tokens(1, 20)
    config = AdapterConfig(
        base_model_name_or_path="x",
        base_shape=base_shape(model),
        window=WINDOW,
        lag=1,
        source="neuron",
        neuron=NeuronSource(**LOUD, rezero=False),
    )
    save_adapter(model, tmp_path / "a", config)
    assert read_adapter(tmp_path / "a") == (config, {})
    want = through_cache(model, ids, [20])
    sparsekv.detach(model)
    sparsekv.attach(model, adapter=str(tmp_path / "a"))
    assert torch.equal(through_cache(model, ids, [20]), want)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"source": "neuron"}, "comes with its channel"),
        ({"neuron": {"channel": -1}}, "comes with its channel"),
        ({"source": "other"}, "must be 'linear' or 'neuron'"),
        ({"source": "neuron", "neuron": {"channel": "last"}}, "integer channel"),
        ({"source": "neuron", "neuron": {"scale": float("nan")}}, "finite scale"),
        ({"source": "neuron", "neuron": {"gain": 1}}, "gain"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(tmp_path, entries, sentence):
    model = attached("Llama")
    config = AdapterConfig(base_model_name_or_path="x", base_shape={}, window=4, source="neuron", neuron=NeuronSource())
    save_adapter(model, tmp_path, config)
    raw = {**json.loads((tmp_path / "adapter_config.json").read_text()), "source": "linear", "neuron": None, **entries}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=sentence):
        read_adapter(tmp_path)


def test_refusals_leave_the_model_alone():
    model = tiny_model("Llama")
    with pytest.raises(ValueError, match="channel 8 does not exist"):
        sparsekv.attach(model, policy="dms", neuron=NeuronSource(channel=8))
    with pytest.raises(ValueError, match="pass a sparsekv"):
        sparsekv.attach(model, policy="dms", neuron="last")
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 64)  # as with a gate beside the queries
    with pytest.raises(ValueError, match="cannot read the queries of LlamaAttention"):
        sparsekv.attach(model, policy="dms", neuron=NeuronSource())
    assert not hasattr(model.model.layers[0].self_attn, "sparsekv_layer")
    assert not any(m._forward_hooks for m in model.modules())


def test_there_are_no_heads_to_hand_out():
    with pytest.raises(ValueError, match="no eviction heads"):
        sparsekv.heads(attached("Llama"))
