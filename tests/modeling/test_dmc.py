"""DMC in a model: against formulas written out, through every cache, and what is refused."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AttentionMaskInterface

import sparsekv
from helpers import FAMILIES, check_pages, tiny_model, tokens
from serving import alone, assert_empty, engine, greedy, prompts
from sparsekv import SparseCache
from sparsekv.attend import Part
from sparsekv.cache.swap import swap_in, swap_out
from sparsekv.dms import NeuronSource
from sparsekv.engine.device.graphs import compiled_decode, why_not_recordable
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import AdapterConfig, base_shape, read_adapter, save_adapter
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.queries.dmc import clear_channel
from sparsekv.modeling.tracing.trace import inspect
from sparsekv.ops.layout import batch_of
from written_out import rotate

LOUD = NeuronSource(scale=5.0, offset=-0.3)
"""Merges about half of all tokens of a tiny model."""
EXACT = {"rtol": 0, "atol": 1e-5}  # decisions and importances are float32


def attached(family: str = "Llama", source: NeuronSource = LOUD, **config: Any) -> Any:
    model = tiny_model(family, dtype=torch.float64, **config)
    sparsekv.attach(model, policy="dmc", neuron=source)
    return model


@torch.no_grad()
def run(model: Any, ids: Tensor, cuts: list[int], cache: SparseCache | None = None, **kwargs: Any) -> Tensor:
    cache = SparseCache(model, page_size=4) if cache is None else cache
    return torch.cat([model(x, past_key_values=cache, **kwargs).logits for x in ids.tensor_split(cuts, dim=1)], dim=1)


@torch.no_grad()
def written(model: Any, ids: Tensor, source: NeuronSource = LOUD) -> Tensor:
    """A plain twin whose attention, token by token, keeps lists of slots: means of keys before RoPE, turned when they
    are read, at the position of their newest token."""
    twin = type(model)(deepcopy(model.config)).to(torch.float64).eval()
    twin.load_state_dict(model.state_dict())
    for layer in twin.model.layers:
        attention = layer.self_attn
        for name in "qk":
            module = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            module.register_forward_hook(lambda _, __, out, a=attention, n=name: setattr(a, n, out))

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        heads, group, length = key.shape[1], query.shape[1] // key.shape[1], query.shape[2]
        q, k = module.q.view(length, -1, 8).clone(), module.k.view(length, heads, 8).clone()
        logits = k[..., -1] * source.scale + source.offset
        weights = (q[..., -1].view(length, heads, group).mean(-1) * source.scale - source.offset).sigmoid()
        q[..., -1] = k[..., -1] = 0
        theta = module.config.rope_parameters["rope_theta"]
        q = rotate(q.transpose(0, 1), theta)
        q[..., -1] = 0
        out = torch.empty(length, heads * group, 8, dtype=q.dtype)
        for h in range(heads):
            slots: list[tuple[Tensor, Tensor, Tensor, int]] = []  # total weight, mean key, mean value, newest token
            for t in range(length):
                w, mean_k, mean_v = weights[t, h], k[t, h], value[0, h, t]
                if slots and logits[t, h] > 0:
                    old, old_k, old_v, _ = slots.pop()
                    mean_k, mean_v = ((old * a + w * b) / (old + w) for a, b in ((old_k, mean_k), (old_v, mean_v)))
                    w = old + w
                slots.append((w, mean_k, mean_v, t))
                keys = []
                for _, mean, _, newest in slots:
                    padded = torch.zeros(1, newest + 1, 8, dtype=q.dtype)
                    padded[0, newest] = mean
                    keys.append(rotate(padded, theta)[0, newest])
                keys = torch.stack(keys)
                keys[:, -1] = 0
                for g in range(h * group, (h + 1) * group):
                    out[t, g] = (keys @ q[g, t] * 8**-0.5).softmax(0) @ torch.stack([s[2] for s in slots])
        return out[None], None

    AttentionInterface.register("lists", attend)
    AttentionMaskInterface.register("lists", lambda *args, **kwargs: None)
    twin.set_attn_implementation("lists")
    return twin(ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_equals_the_formulas_written_out(family: str) -> None:
    model, ids = attached(family, rope_parameters={"rope_theta": 10.0, "rope_type": "default"}), tokens(1, 29)
    want, cache = written(model, ids), SparseCache(model, page_size=4)
    torch.testing.assert_close(run(model, ids, [11, *range(20, 29)], cache), want, **EXACT)
    assert 1.3 < cache.stats().compression_ratio < 4
    check_pages(cache.ragged)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_is_chunked_is_decoded_in_every_family(family: str) -> None:
    model, ids = attached(family), tokens(2, 29)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    for cuts in ([], [13, 22], [8, *range(20, 29)]):
        cache = SparseCache(model, page_size=4)
        torch.testing.assert_close(run(model, ids, cuts, cache), want, **EXACT)
    assert cache.stats().compression_ratio > 1.2


def test_a_padded_row_is_the_text_alone_and_packed_texts_are_the_texts() -> None:
    model, ids = attached(), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cached = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=SparseCache(model, page_size=4)
        ).logits
        packed = model(ids[:1], position_ids=torch.cat([torch.arange(7), torch.arange(17)])[None], use_cache=False)
    text = run(model, ids[:1, 7:], [])
    for got in (whole[:1, 7:], cached[:1, 7:], packed.logits[:, 7:]):
        torch.testing.assert_close(got, text, **EXACT)


def test_never_merging_is_attention_without_the_channel() -> None:
    model, ids = attached(), tokens(1, 20)
    attachment_of(model).policy.offset = -torch.inf
    with torch.no_grad(), contexts.dense(model):
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(run(model, ids, [9, *range(12, 20)]), want, rtol=0, atol=1e-12)


def test_soft_decisions_in_the_limit_are_the_hard_rule() -> None:
    """At a low temperature the noise of the gate is gone; segments here are shorter than the reach."""
    model, ids = attached(), tokens(2, 24)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert inspect(model, ids[:1]).logits.abs().min() > 1e-3, "the test must decide clearly"
    attachment = attachment_of(model)
    attachment.gates = lambda layer, logits: torch.nn.functional.logsigmoid(-logits * 1e6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, **EXACT)


def test_forks_and_swaps_are_exact() -> None:
    model, ids = attached(), tokens(2, 30)
    want = run(model, ids, [])
    cache = SparseCache(model, page_size=4)
    run(model, ids[:, :19], [11], cache)
    cache.batch_repeat_interleave(2)
    swapped = swap_out(cache.ragged, 1)
    cache.ragged.release(torch.tensor([1]))
    swap_in(cache.ragged, 1, swapped)
    got = run(model, ids[:, 19:].repeat_interleave(2, 0), list(range(1, 11)), cache)
    torch.testing.assert_close(got, want[:, 19:].repeat_interleave(2, 0), **EXACT)
    check_pages(cache.ragged)


def test_a_prefill_that_does_not_fit_leaves_the_cache_as_it_was() -> None:
    model, ids = attached(), tokens(1, 30)
    cache = SparseCache(model, page_size=4, kv_memory=24 * 2 * 4 * 8 * 8)
    run(model, ids[:, :9], [], cache)
    with pytest.raises(ValueError, match="the KV pool is full"):
        run(model, tokens(1, 200), [], cache)
    torch.testing.assert_close(run(model, ids[:, 9:14], [2], cache), run(model, ids[:, :14], [])[:, 9:], **EXACT)


@pytest.mark.parametrize("pages", [None, 40])
def test_the_engine_is_plain_generate(pages: int | None) -> None:
    """In chunks beside decodes, forked and, where memory is short, swapped."""
    model, many = attached(), prompts(9, 14, 1, 11)
    llm = engine(model, pages=pages, max_num_batched_tokens=7)
    wanted = [alone(model, p, 20) for p in many]
    assert [o.outputs[0].token_ids for o in llm.generate(many, greedy(20))] == wanted
    (output,) = llm.generate(many[1], greedy(20, n=3))
    assert [c.token_ids for c in output.outputs] == [wanted[1]] * 3
    assert_empty(llm)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@torch.no_grad()
def test_a_decode_step_compiles_for_any_batch_and_depth(family: str) -> None:
    """As CUDA graphs need it; also where there are as many sequences as heads."""
    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        model, counter = attached(family, num_hidden_layers=layers), CompileCounterWithBackend("eager")
        cache = engine(model).engine.runner.cache
        assert why_not_recordable(cache.executor.policies) is None

        def plain(ids: Tensor, positions: Tensor, model: Any = model, cache: Any = cache) -> Tensor:
            return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]

        compiled = compiled_decode(model, cache, backend=counter)
        for count in (4, 3, 2, 1):
            torch.testing.assert_close(_three_steps(cache, compiled, count), _three_steps(cache, plain, count))
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1]


def _three_steps(cache: Any, forward: Any, count: int) -> Tensor:
    cache.ragged.clear()
    out = []
    for position in range(3):
        batch, seen = batch_of(torch.arange(count), [1] * count), torch.full((count,), position, dtype=torch.int32)
        cache.parts = (Part(batch=batch, seen=seen, tokens=count, most=position + 1), None)
        out.append(forward(torch.arange(3, 3 + count)[None], torch.full((1, count), position)).clone())
    return torch.stack(out)


def test_layers_compile_once_and_train_the_same() -> None:

    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        model = tiny_model(num_hidden_layers=layers)
        sparsekv.attach(model, policy="dmc", neuron=LOUD)

        def gradients(model: Any = model) -> list[Tensor]:
            with contexts.soft(model, tau=0.3, seed=1):
                model(tokens(2, 20), use_cache=False).logits.logsumexp(-1).sum().backward()
            found = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            return found

        plain, counter = gradients(), CompileCounterWithBackend("eager")
        with compiled_layers(model, backend=counter):
            for ours, theirs in zip(gradients(), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3"])
@torch.no_grad()
def test_a_cleared_channel_decides_nothing_and_weighs_all_alike(family: str) -> None:
    model, ids = attached(family, NeuronSource()), tokens(1, 12)
    clear_channel(model)
    assert torch.equal(inspect(model, ids).logits[..., :-1], torch.full((2, 2, 11), -5.0))
    sparsekv.detach(model)
    plain = model(ids, use_cache=False).logits
    sparsekv.attach(model, policy="dmc")
    for keep in (0.0, 1.0):  # before RoPE there is nothing left to fade
        attachment_of(model).keep = keep
        logits = model(ids, use_cache=False).logits
        assert (torch.allclose(logits, plain, atol=1e-5)) == (keep == 1.0)


@torch.no_grad()
def test_detach_restores_the_model() -> None:
    model, ids = tiny_model("Phi3"), tokens(1, 12)
    before = model(ids).logits
    sparsekv.attach(model, policy="dmc", neuron=LOUD)
    assert not torch.equal(model(ids, use_cache=False).logits, before)
    sparsekv.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "sparsekv_dmc") for m in model.modules())


def test_an_adapter_brings_the_policy_back(tmp_path: Any) -> None:
    model, ids = attached(), tokens(1, 20)
    config = AdapterConfig(
        base_model_name_or_path="x",
        base_shape=base_shape(model),
        window=5,
        lag=1,
        policy="dmc",
        source="neuron",
        neuron=LOUD,
        offsets=[(-1.0, 1.5), (0.0, 2.0)],
    )
    folder = str(tmp_path / "a")
    save_adapter(model, folder, config)
    assert read_adapter(folder) == (config, {})
    want = run(model, ids, [])
    sparsekv.detach(model)
    policy = sparsekv.attach(model, adapter=folder).policy
    assert (policy.name, policy.reach) == ("dmc", 5)
    assert torch.equal(run(model, ids, []), want)
    sparsekv.detach(model)
    assert sparsekv.attach(model, adapter=folder, cr=1.5).policy.offset == -1
    sparsekv.detach(model)
    with pytest.raises(ValueError, match="is for policy 'dmc', not 'dms'; leave out the policy"):
        sparsekv.attach(model, adapter=folder, policy="dms")
    with pytest.raises(ValueError, match="it must be 'dms', or 'dmc' with source 'neuron'"):
        AdapterConfig(base_model_name_or_path="x", base_shape={}, window=4, policy="dmc")


def test_models_that_turn_their_keys_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring channels turned together, as in GLM and Cohere; and projections that make something else too."""
    from transformers.models.llama import modeling_llama as code

    def interleaved(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(code, "rotate_half", interleaved)
        with pytest.raises(ValueError, match="cannot turn the keys of LlamaForCausalLM itself"):
            sparsekv.attach(model, policy="dmc")
    assert not hasattr(model, "sparsekv_attachment")
    with pytest.raises(ValueError, match="channel 8 does not exist"):
        sparsekv.attach(model, policy="dmc", neuron=NeuronSource(channel=8))
    with pytest.raises(ValueError, match="unexpected keyword argument 'window'; it takes offset, reach"):
        sparsekv.attach(model, policy="dmc", window=4)
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(32, 64)
    with pytest.raises(ValueError, match="cannot read the keys of LlamaAttention"):
        sparsekv.attach(model, policy="dmc")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
