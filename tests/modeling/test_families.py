"""Attention modules that know no groups of query heads, and learned positions: GPT-2, GPT-NeoX, OPT, GPTBigCode."""

import pytest
import torch
import transformers as hf

import sparsekv
from helpers import VOCABULARY, random_heads, tokens
from sparsekv import SparseCache

SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
FAMILIES = {
    "GPT2LMHeadModel": lambda: hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.25, **SHAPE
    ),
    "GPTNeoXForCausalLM": lambda: hf.GPTNeoXConfig(intermediate_size=48, initializer_range=0.25, **WIDE, **SHAPE),
    "OPTForCausalLM": lambda: hf.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, init_std=0.25, **WIDE, **SHAPE),
    "GPTBigCodeForCausalLM": lambda: hf.GPTBigCodeConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.25, **SHAPE
    ),
}


def build(family: str):
    torch.manual_seed(0)
    return getattr(hf, family)(FAMILIES[family]()).double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_generation_is_transformers_own(family):
    theirs, ours = build(family), build(family)
    sparsekv.attach(ours, policy="dense")
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    assert torch.equal(ours.generate(ids * mask, **settings), theirs.generate(ids * mask, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_the_cache_forgets_is_what_the_mask_hides(family):
    model, ids = build(family), tokens(2, 30)
    sparsekv.attach(model, policy="dms", window=3)
    random_heads(model)
    cache = SparseCache(model, page_size=4)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([19, *[1] * 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits)
    assert cache.stats().compression_ratio > 1.2
