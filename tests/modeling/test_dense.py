"""Nothing marked: an attached model is the model, for every supported family."""

import pytest
import torch
from transformers import DynamicCache

import sparsekv
from helpers import FAMILIES, tiny_model, tokens
from sparsekv import SparseCache

PROMPT, STEPS = 23, 100


@pytest.mark.parametrize("policy", ["dense", "dms"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_own(family, policy):
    """Prefill and 100 decode steps, past the sliding window; untrained heads mark nothing."""
    model, ids = tiny_model(family), tokens(2, PROMPT + STEPS)
    ours = tiny_model(family)
    sparsekv.attach(ours, policy=policy)
    theirs, cache = DynamicCache(config=model.config), SparseCache(ours, page_size=8)
    for part in ids.split([PROMPT, *[1] * STEPS], dim=1):
        expected = model(part, past_key_values=theirs).logits
        assert torch.allclose(ours(part, past_key_values=cache).logits, expected, rtol=2e-5, atol=2e-5)
    assert cache.get_seq_length() == PROMPT + STEPS
    sliding = family == "Gemma3"
    assert (cache.stats().compression_ratio > 1) == sliding
    assert torch.allclose(ours(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)  # without a cache


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_transformers_own(padding):
    model, ids, mask = tiny_model(), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    ours = tiny_model()
    sparsekv.attach(ours, policy="dense")
    mask[1, slice(0, 5) if padding == "left" else slice(7, 12)] = 0
    for cache in (None, SparseCache(ours)):
        out = ours(ids, attention_mask=mask, past_key_values=cache).logits
        expected = model(ids, attention_mask=mask).logits
        assert torch.allclose(out[mask.bool()], expected[mask.bool()], rtol=2e-5, atol=2e-5)
        assert torch.isfinite(out).all()


@torch.no_grad()
def test_packed_documents_equal_transformers_own():
    """Positions that start anew keep documents apart, without a cache."""
    model, ids = tiny_model(), tokens(1, 12)
    ours = tiny_model()
    sparsekv.attach(ours, policy="dense")
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(ours(ids, position_ids=positions).logits, expected, atol=2e-5)
    alone = ours(ids[:, 5:]).logits
    assert torch.allclose(expected[:, 5:], alone, atol=2e-5)


@torch.no_grad()
def test_bfloat16_runs():
    model = tiny_model(dtype=torch.bfloat16)
    sparsekv.attach(model, policy="dms", window=4)
    cache = SparseCache(model)
    assert model(tokens(1, 9), past_key_values=cache).logits.dtype == torch.bfloat16
    assert cache.ragged.pool.kv.dtype == torch.bfloat16
