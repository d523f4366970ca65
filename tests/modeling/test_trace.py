"""inspect: the decisions that it reports are those that the cache carried out."""

import pytest
import torch

import sparsekv
from helpers import dms_model, tiny_model, tokens
from sparsekv import dms

LENGTH = 25


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_trace_agrees_with_what_the_cache_holds(family, lag):
    model = dms_model(family, window=4, lag=lag)
    trace = sparsekv.inspect(model, tokens(1, LENGTH))
    layers = len(sparsekv.heads(model))
    assert trace.logits.shape == trace.marks.shape == (layers, 2, LENGTH)
    assert trace.logits.dtype == torch.float32
    assert torch.equal(trace.marks, trace.logits > 0)
    assert trace.window == 4
    assert trace.held.sum(-1).tolist() == trace.stats.held[-layers:]
    assert trace.held[..., -4:].all()
    if lag:
        assert (trace.logits[..., -1] == -torch.inf).all()  # not decided yet


def test_trace_of_the_first_layer_by_hand():
    """The first layer's input is the normed embedding."""
    model, ids = dms_model(window=4), tokens(1, LENGTH)
    policy = sparsekv.modeling.attach.attachment_of(model).policy
    policy.offset = 0.5
    layer, head = model.model.layers[0], sparsekv.heads(model)[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))[0]
    trace = sparsekv.inspect(model, ids[0])
    assert torch.allclose(trace.logits[0].T, dms.linear_logits(hidden, head.weight, head.bias) + 0.5, atol=1e-6)
    assert "logits" not in vars(policy)


def test_a_text_of_one_token():
    trace = sparsekv.inspect(dms_model(window=4), tokens(1, 1))
    assert trace.marks.shape == (2, 2, 1)
    assert trace.held.all()


METHODS = {
    "dense": {},
    "streaming": {"budget": 12},
    "tova": {"budget": 12},
    "h2o": {"budget": 12},
    "random": {"budget": 12},
    "snapkv": {"budget": 34},
    "dmc": {},
}


@pytest.mark.parametrize("policy", METHODS)
def test_what_is_held_is_what_the_allocator_counts(policy):
    model = tiny_model()
    sparsekv.attach(model, policy=policy, **METHODS[policy])
    trace = sparsekv.inspect(model, tokens(1, 60))
    assert trace.held.shape == (2, 2, 60)
    assert trace.held.sum(-1).tolist() == trace.stats.held
    assert trace.lengths[-1] == 60
    assert trace.ratios[-1] == trace.stats.compression_ratio
    assert trace.read is None
    policy_object = sparsekv.modeling.attach.attachment_of(model).policy
    assert not {"store", "read", "logits"} & set(vars(policy_object))


def test_the_tokens_held_are_those_of_the_rule():
    model = dms_model(window=4)
    trace = sparsekv.inspect(model, tokens(1, LENGTH))
    rule = dms.visible(torch.tensor(LENGTH - 1), torch.arange(LENGTH), trace.marks, 4)
    assert torch.equal(trace.held, rule)
    streaming = tiny_model()
    sparsekv.attach(streaming, policy="streaming", budget=12, sinks=3)
    kept = sparsekv.inspect(streaming, tokens(1, LENGTH)).held
    assert kept[..., :3].all() and kept[..., -9:].all() and not kept[..., 3:-9].any()


def test_tova_drops_the_same_tokens_in_all_heads_of_a_layer_and_a_prompt_is_read_whole():
    model = tiny_model()
    sparsekv.attach(model, policy="tova", budget=12)
    trace = sparsekv.inspect(model, tokens(1, 40), prompt=30)
    assert torch.equal(trace.held[:, 0], trace.held[:, 1])
    assert (trace.lengths[0], trace.ratios[0]) == (30, 1.0)
    with pytest.raises(ValueError, match="prompt is 40 and the text has 40 tokens; leave one at least"):
        sparsekv.inspect(model, tokens(1, 40), prompt=40)


def test_quest_holds_all_and_reads_some():
    model = tiny_model(num_hidden_layers=3)
    sparsekv.attach(model, policy="quest", budget=16)
    trace = sparsekv.inspect(model, tokens(1, 120))
    assert trace.held.all()
    assert trace.read[:2].all()  # its first two layers are dense
    assert 0 < int(trace.read[2].sum(-1).max()) <= 3 * 16
    assert trace.read[2, :, -1].all()


def test_refusals():
    with pytest.raises(ValueError, match="this model is not attached"):
        sparsekv.inspect(tiny_model(), tokens(1, 5))
    with pytest.raises(ValueError, match=r"inspect takes one text, and input_ids is \(2, 5\)"):
        sparsekv.inspect(dms_model(), tokens(2, 5))
    with pytest.raises(ValueError, match="inspect takes one text"):
        sparsekv.inspect(dms_model(), tokens(1, 0))
