"""Forwards without a cache: hard marks are inference, soft gates train, dense is the teacher."""

import pytest
import torch

import sparsekv
from helpers import dms_model, oracle_logits, tiny_model, tokens
from sparsekv import SparseCache, dms
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of

LENGTH, WINDOW = 20, 4
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_hard_training_mask_is_inference_in_a_padded_batch(side, lag):
    model, ids, mask = dms_model(window=WINDOW, lag=lag), tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, slice(0, 6) if side == "left" else slice(14, LENGTH)] = 0
    out = model(ids, attention_mask=mask).logits
    cached = model(ids, attention_mask=mask, past_key_values=SparseCache(model)).logits
    assert torch.allclose(out[mask.bool()], cached[mask.bool()], **EXACT)
    alone = oracle_logits(model, ids[1:, mask[1].bool()], window=WINDOW, lag=lag)[0]
    assert torch.allclose(out[1, mask[1].bool()], alone, atol=1e-5)  # RoPE's angles, at shifted positions, are float32


@pytest.mark.parametrize("policy", [{"policy": "streaming", "budget": 7, "sinks": 2}, {"policy": "dense"}])
@torch.no_grad()
def test_other_policies_too(policy):
    model, ids, mask = tiny_model(dtype=torch.float64), tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    sparsekv.attach(model, **policy)
    mask[1, :6] = 0  # the sinks are the text's first tokens, not the padding
    out = model(ids, attention_mask=mask).logits
    cached = model(ids, attention_mask=mask, past_key_values=SparseCache(model)).logits
    assert torch.allclose(out[mask.bool()], cached[mask.bool()], **EXACT)


@torch.no_grad()
def test_packed_documents_are_apart():
    model, ids = dms_model(window=WINDOW), tokens(1, LENGTH)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    out = model(ids, position_ids=positions).logits
    for part in (slice(0, 8), slice(8, LENGTH)):
        assert torch.allclose(out[:, part], oracle_logits(model, ids[:, part], window=WINDOW), **EXACT)


@pytest.mark.parametrize("lag", [0, 1])
@torch.no_grad()
def test_soft_gates_of_huge_logits_are_hard_marks(lag):
    model, ids = dms_model(window=WINDOW, lag=lag), tokens(1, LENGTH)
    for head in sparsekv.heads(model):
        head.weight.data *= 1e6
    with contexts.soft(model, tau=0.1) as gates:
        out = model(ids).logits
    assert torch.allclose(out, oracle_logits(model, ids, window=WINDOW, lag=lag), **EXACT)
    marks = sparsekv.inspect(model, ids).marks
    fraction = torch.stack([gate > 0 for gate in gates.gates.values()]).float().mean()
    assert len(gates.gates) == 2
    assert gates.gates[0].shape == (LENGTH, 2)
    assert float(fraction) == pytest.approx(float(marks.float().mean()), abs=0.03 * lag + 1e-6)


@torch.no_grad()
def test_soft_gates_are_drawn_anew_unless_seeded():
    model, ids = dms_model(window=WINDOW), tokens(1, LENGTH)

    def soft(seed):
        with contexts.soft(model, tau=0.1, seed=seed):
            return model(ids).logits

    assert torch.equal(soft(0), soft(0))
    assert not torch.equal(soft(0), soft(1))
    assert not torch.equal(soft(None), soft(None))
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_heads_learn_through_the_soft_gate_alone():
    """Distillation and the hinge reach every head; a hard forward gives them nothing."""
    model, ids = dms_model(window=WINDOW, bias=-1.0), tokens(2, LENGTH)
    model.requires_grad_(False)
    for head in sparsekv.heads(model):
        head.requires_grad_(True)
    with torch.no_grad(), contexts.dense(model):
        teacher = model(ids).logits
    with contexts.soft(model, tau=0.1) as gates:
        student = model(ids).logits
    fraction = torch.cat([gate.sigmoid() for gate in gates.gates.values()]).mean()
    (dms.kl_teacher_student(teacher, student).mean() + dms.hinge(fraction, 0.9)).backward()
    for head in sparsekv.heads(model):
        assert torch.isfinite(head.weight.grad).all()
        assert (head.weight.grad.abs().sum(1) > 0).all()
    assert not model(ids).logits.requires_grad


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@torch.no_grad()
def test_dense_is_the_teacher_and_comes_back(family):
    model, ids = dms_model(family, window=WINDOW), tokens(1, LENGTH)
    plain = tiny_model(family, dtype=torch.float64)
    sparse = model(ids).logits
    with contexts.dense(model):
        assert torch.allclose(model(ids).logits, plain(ids).logits, **EXACT)
        cache = SparseCache(model)
        assert torch.allclose(model(ids, past_key_values=cache).logits, plain(ids).logits, **EXACT)
    assert not torch.allclose(sparse, plain(ids).logits, atol=1e-3)
    assert torch.equal(model(ids).logits, sparse)


def test_modes_end_with_an_error():
    model = dms_model()
    policies = [attached.policy for attached in attachment_of(model).layers]
    for mode in (lambda: contexts.dense(model), lambda: contexts.soft(model, tau=0.1)):
        with pytest.raises(RuntimeError, match="boom"), mode():
            raise RuntimeError("boom")
        assert attachment_of(model).gates is None
        assert [attached.policy for attached in attachment_of(model).layers] == policies
