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


def test_refusals():
    model = tiny_model()
    sparsekv.attach(model, policy="streaming", budget=9)
    with pytest.raises(ValueError, match="policy 'streaming' makes no decisions per token; attach with DMS"):
        sparsekv.inspect(model, tokens(1, 5))
    with pytest.raises(ValueError, match=r"inspect takes one text, and input_ids is \(2, 5\)"):
        sparsekv.inspect(dms_model(), tokens(2, 5))
    with pytest.raises(ValueError, match="inspect takes one text"):
        sparsekv.inspect(dms_model(), tokens(1, 0))
