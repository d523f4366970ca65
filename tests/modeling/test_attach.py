"""attach and detach leave nothing behind; what cannot be attached is refused with the reason."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import sparsekv
from helpers import FAMILIES, dms_model, tiny_model, tokens
from sparsekv import SparseCache
from sparsekv.modeling.attach import attachment_of
from sparsekv.policies import Policy


def fingerprint(model) -> dict:
    """All that attach could change."""
    return {
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "implementation": model.config._attn_implementation,
        "inner": [getattr(m, "config", None) and m.config._attn_implementation for m in model.modules()],
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@torch.no_grad()
def test_detach_restores_the_model(family, implementation):
    model, ids = tiny_model(family), tokens(1, 20)
    model.set_attn_implementation(implementation)
    before, logits = fingerprint(model), model(ids).logits
    for options in ({"policy": "dms", "window": 3}, {"policy": "streaming", "budget": 9}, {"policy": Policy()}):
        sparsekv.attach(model, **options)
        assert model.config._attn_implementation == "sparsekv"
        model(ids, past_key_values=SparseCache(model))
        sparsekv.detach(model)
        assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, logits)
    model(
        ids[:, 10:],
        past_key_values=model(ids[:, :10], past_key_values=DynamicCache(config=model.config)).past_key_values,
    )


def test_a_detached_model_keeps_nothing_alive():
    model = tiny_model()
    attachment = weakref.ref(sparsekv.attach(model, policy="dms"))
    model(tokens(1, 5), past_key_values=SparseCache(model))
    sparsekv.detach(model)
    gc.collect()
    assert attachment() is None


def test_importing_changes_nothing_in_transformers():
    code = """
from transformers import AttentionInterface, AttentionMaskInterface
before = list(AttentionInterface._global_mapping), list(AttentionMaskInterface._global_mapping)
import sparsekv.modeling.attach, sparsekv.modeling.cache, sparsekv.modeling.tracing.trace
assert before == (list(AttentionInterface._global_mapping), list(AttentionMaskInterface._global_mapping))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attaching_leaves_other_models_alone():
    other = tiny_model()
    before = fingerprint(other)
    sparsekv.attach(tiny_model(), policy="dms")
    assert fingerprint(other) == before


def test_heads_and_their_place():
    model = tiny_model("Gemma3")
    attachment = sparsekv.attach(model, policy="dms", window=7, lag=1, offset=-2.0)
    (head,) = sparsekv.heads(model)  # the sliding layer has none
    assert (tuple(head.weight.shape), tuple(head.bias.shape)) == ((2, 32), (2,))
    assert model.model.layers[1].self_attn.eviction_head is head
    assert [attached.policy.name for attached in attachment.layers] == ["sliding-window", "dms"]
    assert (attachment.policy.window(1), attachment.policy.lag, attachment.policy.offset) == (7, 1, -2.0)
    assert attachment_of(model) is attachment


def test_a_vision_language_model_is_governed_in_its_text_part():
    """The decoder alone changes its attention; the vision tower keeps its own."""
    text = {**tiny_model("Gemma3").config.to_dict(), "vocab_size": 300}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=299)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    tower = model.config.vision_config._attn_implementation
    sparsekv.attach(model, policy="dms", window=3)
    assert model.config.text_config._attn_implementation == "sparsekv"
    assert model.config.vision_config._attn_implementation == tower
    cache = SparseCache(model)
    out = model.generate(tokens(1, 9), max_new_tokens=4, past_key_values=cache)
    assert out.shape == (1, 13)
    sparsekv.detach(model)
    assert model.config.text_config._attn_implementation == tower


# Refusals


REFUSED = {
    "is an encoder-decoder, and only decoders": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ),
    "does not go through the Transformers attention interface": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)
    ),
    "soft-caps the logits": lambda: tiny_model("Gemma2", head_dim=8),
    "has learned sinks": lambda: tiny_model("GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    r"is latent \(MLA\)": lambda: tiny_model(
        "DeepseekV3",
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
    ),
    "dynamic-NTK RoPE": lambda: tiny_model(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "every layer has a sliding window": lambda: tiny_model("Mistral", sliding_window=9),
    "attend to an encoder's output too": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=9, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, add_cross_attention=True
        )
    ),
    "is not causal": lambda: hf.BertLMHeadModel(
        hf.BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(reason):
    model = REFUSED[reason]()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"^sparsekv cannot attach to {type(model).__name__}: .*{reason}"):
        sparsekv.attach(model, policy="dense")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass policy=... or adapter=..."),
        ({"policy": "tova", "adapter": "x"}, "an adapter's heads are for policy 'dms' or 'dms-quest', not 'tova'"),
        ({"policy": "dms-quest", "adapter": "x", "window": 4}, "an adapter brings its own settings; leave out window"),
        ({"policy": "lru"}, "unknown policy 'lru'; use one of dense"),
        (
            {"policy": "dms", "windw": 3},
            "unexpected keyword argument 'windw'; it takes lag, offset",
        ),
        ({"policy": "dms", "window": 0}, "window is 0"),
        ({"policy": "dms", "cr": 4}, "cr picks a ratio of trained heads: pass adapter="),
        ({"policy": "streaming"}, "missing 1 required keyword-only argument: 'budget'"),
        ({"policy": "streaming", "budget": 4}, "budget 4 leaves no recent window"),
        ({"policy": "tova", "budget": 0}, "budget is 0 and policy 'tova' needs at least 1; raise it"),
        ({"policy": "h2o", "budget": "9"}, "budget is '9'; it counts tokens, so use an integer"),
        ({"policy": "snapkv", "budget": 32}, "budget is 32 and policy 'snapkv' needs at least 33"),
        ({"policy": "tova", "budget": 257}, "budget is 257 and the model's context is 256 tokens; lower it"),
        ({"policy": "tova", "cr": 4}, "pass tokens="),
        ({"policy": "tova", "cr": 4, "tokens": 64, "budget": 3}, "pass one of them"),
        ({"policy": "tova", "cr": 0.5, "tokens": 64}, "cr is 0.5; it is tokens seen over tokens held"),
        ({"policy": "dense", "cr": 4, "tokens": 64}, "policy 'dense' has no budget that cr could set"),
        ({"policy": "quest", "budget": 64, "page_size": 24}, "page_size is 24; policy 'quest' needs a power of two"),
        ({"policy": "random", "budget": 9, "seed": "x"}, "seed is 'x'; use an integer"),
        ({"policy": Policy(), "budget": 4}, "a Policy object brings its own settings; leave out budget"),
        ({"adapter": "x", "window": 4}, "an adapter brings its own settings; leave out window"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options, message):
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        sparsekv.attach(model, **options)
    assert fingerprint(model) == before


def test_attached_twice_or_not_at_all():
    model = tiny_model()
    for call in (sparsekv.detach, sparsekv.heads, SparseCache, attachment_of):
        with pytest.raises(ValueError, match=r"this model is not attached; call sparsekv.attach"):
            call(model)
    sparsekv.attach(model, policy="dense")
    with pytest.raises(ValueError, match=r"this model is attached already; call sparsekv.detach"):
        sparsekv.attach(model, policy="dms")
    with pytest.raises(ValueError, match="policy 'dense' has no eviction heads; attach with policy='dms'"):
        sparsekv.heads(model)


def test_a_foreign_cache_is_refused_in_the_second_forward():
    model, cache = dms_model(), DynamicCache()
    model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"got a cache that is not ours: pass past_key_values=sparsekv.SparseCache"):
        model(tokens(1, 1), past_key_values=cache)


def test_dropout_and_custom_masks_are_refused():
    model = tiny_model(attention_dropout=0.1)
    sparsekv.attach(model, policy="dense")
    model(tokens(1, 5))
    with pytest.raises(ValueError, match="attention dropout is not supported: load the model with attention_dropout=0"):
        model.train()(tokens(1, 5))
    mask = torch.zeros(1, 1, 5, 5)
    with pytest.raises(ValueError, match="a custom 4D attention mask is not supported: pass the 2D padding mask"):
        model.eval()(tokens(1, 5), attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_have_heads_in_every_full_layer(family):
    model = dms_model(family)
    assert len(sparsekv.heads(model)) == (1 if family == "Gemma3" else 2)
