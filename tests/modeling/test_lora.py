"""LoRA of an adapter: merged it is what PEFT computes, and detach gives the base model back bit for bit."""

import copy
from pathlib import Path

import peft
import pytest
import torch

import sparsekv
from helpers import random_heads, tiny_model, tokens
from sparsekv import SparseCache
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import PREFIX, AdapterConfig, base_shape, read_adapter, save_adapter, write_adapter

TARGETS = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32)}
"""Name -> (in, out), of tiny_model()."""


def lora_state(*, rank: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for layer in (0, 1):
        for name, (into, out) in TARGETS.items():
            path = f"model.layers.{layer}.{name}"
            state[f"{path}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * 0.2
            state[f"{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.2
    return state


def write(folder: Path, lora: dict[str, torch.Tensor]) -> Path:
    model = tiny_model()
    sparsekv.attach(model, policy="dms", window=3)
    random_heads(model, seed=5)
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        base_shape=base_shape(model),
        window=3,
        r=3,
        lora_alpha=12,
        target_modules=[name.split(".")[-1] for name in TARGETS],
        offsets=[(-2.0, 1.2), (3.0, 8.0)],
    )
    heads = {
        f"model.layers.{i}.self_attn.eviction_head.{key}": tensor
        for i, head in enumerate(sparsekv.heads(model))
        for key, tensor in head.state_dict().items()
    }
    write_adapter(folder, config, {PREFIX + name: tensor for name, tensor in (heads | lora).items()})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "a", lora_state())


@torch.no_grad()
def test_peft_reads_the_folder_and_computes_the_same(folder: Path) -> None:
    ids = tokens(1, 12)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
    model = tiny_model()
    sparsekv.attach(model, adapter=str(folder), cr=1)
    with contexts.dense(model):
        ours = model(ids).logits
    assert torch.allclose(ours, theirs(ids).logits, atol=1e-5)
    assert not torch.allclose(ours, tiny_model()(ids).logits, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_detach_and_original_restore_every_bit(folder: Path, dtype: torch.dtype) -> None:
    model, plain, ids = tiny_model(dtype=dtype), tiny_model(dtype=dtype), tokens(1, 12)
    addresses = [p.data_ptr() for p in model.parameters()]
    sparsekv.attach(model, adapter=str(folder), cr=4)
    merged = [p.clone() for p in model.parameters()]
    with contexts.original(model):
        assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, plain.model.layers[1].self_attn.q_proj.weight)
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6 if dtype == torch.float32 else 3e-2)
    assert all(torch.equal(p, m) for p, m in zip(model.parameters(), merged, strict=True))
    assert sum(not torch.equal(p, m) for p, m in zip(plain.parameters(), merged, strict=False)) > 0
    sparsekv.detach(model)
    assert [p.data_ptr() for p in model.parameters()] == addresses  # compiled code and graphs may keep them
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
def test_an_attached_model_saves_its_lora_too(folder: Path, tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    sparsekv.attach(model, adapter=str(folder), cr=2)
    config, state = read_adapter(folder)
    save_adapter(model, tmp_path / "b", config)
    again, saved = read_adapter(tmp_path / "b")
    assert again == config
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], state[name]) for name in state)
    other = tiny_model()
    sparsekv.attach(other, adapter=str(tmp_path / "b"), cr=2)
    first, second = (m(ids, past_key_values=SparseCache(m)).logits for m in (model, other))
    assert torch.equal(first, second)


def broken(change: str) -> dict[str, torch.Tensor]:
    state, name = lora_state(), "model.layers.1.self_attn.q_proj"
    if change == "pair":
        del state[f"{name}.lora_A.weight"]
    elif change == "shape":
        state[f"{name}.lora_B.weight"] = torch.zeros(31, 3)
    elif change == "nan":
        state[f"{name}.lora_B.weight"][0, 0] = torch.nan
    elif change == "layer":
        state["model.layers.1.self_attn.w.lora_A.weight"] = state.pop(f"{name}.lora_A.weight")
    elif change == "kind":
        state["model.layers.1.input_layernorm.lora_A.weight"] = state.pop(f"{name}.lora_A.weight")
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pair", "every lora_A needs its lora_B"),
        ("shape", r"self_attn.q_proj has \(3, 32\) and \(31, 3\)"),
        ("nan", "holds numbers that are not finite"),
        ("layer", r"for another model: it has no model\.layers\.1\.self_attn\.w"),
        ("kind", "a LlamaRMSNorm, cannot be merged"),
    ],
)
def test_lora_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, change: str, message: str) -> None:
    model, plain = tiny_model(), tiny_model()
    with pytest.raises(ValueError, match=message):
        sparsekv.attach(model, adapter=str(write(tmp_path / "a", broken(change))))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    sparsekv.attach(model, policy="dense")


def test_lora_on_tied_embeddings_is_refused(tmp_path: Path) -> None:
    state = {"lm_head.lora_A.weight": torch.zeros(3, 32), "lm_head.lora_B.weight": torch.zeros(61, 3)}
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tied to the embeddings"):
        sparsekv.attach(model, adapter=str(write(tmp_path / "a", state)))


@torch.no_grad()
def test_a_copy_has_its_own_merged_weights(folder: Path) -> None:
    ids, plain = tokens(1, 12), tiny_model()
    model = tiny_model()
    sparsekv.attach(model, adapter=str(folder), cr=2)
    merged, twin = model(ids).logits, copy.deepcopy(model)
    sparsekv.detach(twin)
    assert torch.equal(twin(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids).logits, merged)
