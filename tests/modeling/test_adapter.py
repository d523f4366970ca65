"""Adapters: what is saved is what is loaded; what is damaged, foreign or missing is refused in one sentence."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekv
from helpers import dms_model, random_heads, tiny_model, tokens
from sparsekv import SparseCache
from sparsekv.modeling import adapter as adapters
from sparsekv.modeling.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, base_shape, load_adapter, save_adapter

TABLE = [(-8.0, 1.5), (-4.0, 2.0), (0.0, 8.0)]


def config_of(model, **changes) -> AdapterConfig:
    settings = {"base_model_name_or_path": "tiny", "base_shape": base_shape(model), "window": 3, "offsets": TABLE}
    return AdapterConfig(**{**settings, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    model = random_heads(_dms(tiny_model()), seed=5)
    save_adapter(model, tmp_path / "a", config_of(model))
    return tmp_path / "a"


def _dms(model):
    sparsekv.attach(model, policy="dms", window=3)
    return model


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@torch.no_grad()
def test_saved_and_loaded_heads_are_the_same(family, tmp_path):
    model, ids = random_heads(_dms(tiny_model(family)), seed=5), tokens(1, 20)
    config = config_of(model, lag=1, training={"steps": 7}, calibration={"tokens": 9})
    save_adapter(model, tmp_path / "x" / "a", config)
    loaded = tiny_model(family)
    sparsekv.attach(loaded, adapter=str(tmp_path / "x" / "a"))
    for ours, theirs in zip(sparsekv.heads(model), sparsekv.heads(loaded), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    policy = sparsekv.modeling.attach.attachment_of(loaded).policy
    assert (policy.window(1), policy.lag, policy.offset) == (3, 1, 0.0)
    assert load_adapter(str(tmp_path / "x" / "a"), loaded).config == config
    assert not torch.equal(loaded(ids).logits, tiny_model(family)(ids).logits)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["a"]  # nothing half-written beside it


def test_files_and_names_are_peft_s(folder):
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    state = load_file(folder / WEIGHTS_FILE)
    assert sorted(state) == [
        f"base_model.model.model.layers.{i}.self_attn.eviction_head.{name}"
        for i in (0, 1)
        for name in ("bias", "weight")
    ]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    raw = json.loads((folder / CONFIG_FILE).read_text())
    assert raw["peft_type"] == "SPARSEKV_DMS"
    assert raw["base_model_name_or_path"] == "tiny"


def test_saving_over_an_adapter_replaces_it(folder):
    model = random_heads(_dms(tiny_model()), seed=6)
    save_adapter(model, folder, config_of(model, window=9))
    assert load_adapter(str(folder), model).config.window == 9
    assert torch.equal(load_adapter(str(folder), model).heads[1]["weight"], sparsekv.heads(model)[1].weight)


def test_a_failed_save_leaves_the_old_adapter_whole(folder):
    model, before = _dms(tiny_model()), {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TypeError):
        save_adapter(model, folder, config_of(model, training={"what": object()}))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


# The dial


@pytest.mark.parametrize(
    ("ratio", "offset"),
    [(1, -math.inf), (1.5, -8), (2, -4), (1.75, -6), (5, -2), (8, 0), (8.04, 0.04 / 1.5), (1.25, -10)],
)
def test_offset_for(ratio, offset):
    assert config_of(tiny_model()).offset_for(ratio) == pytest.approx(offset)
    assert config_of(tiny_model()).max_cr == 8


@pytest.mark.parametrize(
    ("ratio", "table", "message"),
    [
        (0.5, TABLE, "the compression ratio is 0.5; it is tokens seen over tokens held, so use 1 or more"),
        (math.nan, TABLE, "the compression ratio is nan"),
        (9, TABLE, "the compression ratio is 9; this adapter holds up to 8"),
        (4, [], "this adapter has no table of ratios; run `sparsekv calibrate` on it, or leave out cr"),
        (4, [(0.0, 8.0)], "the compression ratio is 4; this adapter's table knows only 8"),
    ],
)
def test_ratios_that_it_does_not_hold(ratio, table, message):
    with pytest.raises(ValueError, match=message):
        config_of(tiny_model(), offsets=table).offset_for(ratio)


def test_a_table_of_one_row():
    assert config_of(tiny_model(), offsets=[(0.5, 7.3)]).offset_for(7.3) == 0.5


@torch.no_grad()
def test_ratio_one_is_exactly_dense(folder):
    model, ids = tiny_model(), tokens(1, 30)
    sparsekv.attach(model, adapter=str(folder), cr=1)
    cache = SparseCache(model)
    assert torch.allclose(model(ids, past_key_values=cache).logits, tiny_model()(ids).logits, atol=2e-5)
    assert cache.stats().compression_ratio == 1


def test_cr_is_meant_for_a_length(folder):
    rewrite(folder, calibration={"length": 100}, ratios={"400": [2, 4, 20]})
    model = tiny_model()
    sparsekv.attach(model, adapter=str(folder), cr=4, tokens=400)
    assert sparsekv.modeling.attach.attachment_of(model).policy.offset == -4
    sparsekv.detach(model)
    with pytest.raises(ValueError, match="tokens is the length that cr is meant for; pass cr"):
        sparsekv.attach(model, adapter=str(folder), tokens=400)


def test_cr_sets_the_offset(folder):
    model = tiny_model()
    sparsekv.attach(model, adapter=str(folder), cr=5)
    assert sparsekv.modeling.attach.attachment_of(model).policy.offset == -2
    sparsekv.detach(model)
    with pytest.raises(ValueError, match="this adapter holds up to 8"):
        sparsekv.attach(model, adapter=str(folder), cr=20)
    sparsekv.attach(model, policy="dense")  # a refusal left nothing behind


# Refusals


def rewrite(folder: Path, **changes) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**raw, **changes}))


def damage_tensors(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)


KEY = "base_model.model.model.layers.1.self_attn.eviction_head.weight"
DAMAGE = {
    "has no adapter_config.json": lambda f: (f / CONFIG_FILE).unlink(),
    "has no adapter_model.safetensors": lambda f: (f / WEIGHTS_FILE).unlink(),
    "is damaged .*; fetch or train it again": lambda f: (f / CONFIG_FILE).write_text('{"window": '),
    "is damaged": lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-50]),
    "is damaged .*": lambda f: (f / WEIGHTS_FILE).write_bytes(b"\0" * 200),
    "is damaged .*header.*": lambda f: (f / WEIGHTS_FILE).write_bytes(b""),
    "is not sparsekv's: it needs base_model_name_or_path, base_shape": lambda f: (f / CONFIG_FILE).write_text("[]"),
    "has unknown keys: colour, size; a newer sparsekv": lambda f: rewrite(f, size=8, colour=1),
    "r is 8 and target_modules .*; LoRA has both": lambda f: rewrite(f, r=8, lora_alpha=1),
    "its configuration names LoRA and it holds none": lambda f: rewrite(f, r=8, target_modules=["q_proj"]),
    "window must be an integer of at least 1": lambda f: rewrite(f, window=0),
    "window must be an integer": lambda f: rewrite(f, window="64"),
    "and lag 0, 1 or the window": lambda f: rewrite(f, lag=2),
    "offsets must be a list of": lambda f: rewrite(f, offsets=[[1, 2, 3]]),
    "ratios must hold, by length in tokens, one ratio for each": lambda f: rewrite(f, ratios={"512": [2.0]}),
    "offsets must ascend": lambda f: rewrite(f, offsets=[[0, 4], [1, 4]]),
    "damaged: it has heads for layers": lambda f: damage_tensors(
        f, lambda s: [s.pop(k) for k in list(s) if ".layers.1." in k]
    ),
    r"damaged: layer 1 has .*'weight': \(2, 31\)": lambda f: damage_tensors(
        f, lambda s: s.update({KEY: s[KEY][:, 1:].clone()})
    ),
    "damaged: layer 1 holds numbers that are not finite": lambda f: damage_tensors(
        f, lambda s: s[KEY].fill_(torch.nan)
    ),
    "lora_A.weight', which is no eviction head": lambda f: damage_tensors(
        f, lambda s: s.update({"base_model.model.model.layers.1.self_attn.lora_A.weight": torch.zeros(2, 32)})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_adapter_is_refused(folder, message):
    DAMAGE[message](folder)
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        sparsekv.attach(model, adapter=str(folder))
    sparsekv.attach(model, policy="dense")  # the model was left alone


@pytest.mark.parametrize("change", [{"family": "Qwen2"}, {"num_hidden_layers": 3}, {"num_key_value_heads": 4}])
def test_an_adapter_of_another_model_names_both(folder, change):
    model = tiny_model(**change)
    message = r"was trained for tiny \(model_type llama, .*\) and the model is (Llama|Qwen2)ForCausalLM \(model_type"
    with pytest.raises(ValueError, match=message):
        sparsekv.attach(model, adapter=str(folder))


def test_a_missing_adapter(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise adapters.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(adapters, "snapshot_download", offline)
    for name in (str(tmp_path / "nowhere"), "someone/something"):
        with pytest.raises(ValueError, match=f"there is no adapter {name}: neither a folder here nor one that the hub"):
            sparsekv.attach(tiny_model(), adapter=name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; an adapter is a folder with adapter_config.json and"):
        sparsekv.attach(tiny_model(), adapter=str(tmp_path / "file"))


def test_a_model_without_heads_has_no_adapter(tmp_path):
    model = tiny_model()
    sparsekv.attach(model, policy="dense")
    with pytest.raises(ValueError, match="this model has no eviction heads to save; attach it with policy='dms'"):
        save_adapter(model, tmp_path / "a", config_of(model))
    assert not list(tmp_path.iterdir())


# The hub


def test_push_to_hub_and_back(folder, monkeypatch):
    calls = []

    class FakeApi:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(adapters, "HfApi", FakeApi)
    assert adapters.push_to_hub(folder, "me/tiny", token="t", private=True) == "https://hub/me/tiny"
    assert calls == ["t", ("me/tiny", True, True), ("me/tiny", [CONFIG_FILE, WEIGHTS_FILE])]
    monkeypatch.setattr(adapters, "snapshot_download", lambda name, allow_patterns: str(folder))
    model = tiny_model()
    sparsekv.attach(model, adapter="me/tiny")
    assert len(sparsekv.heads(model)) == 2
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match="has no adapter_model"):
        adapters.push_to_hub(folder, "me/tiny")


def test_tied_weights_survive_a_save_of_the_attached_model(tmp_path):
    """save_pretrained of an attached model writes a plain model; the heads are the adapter's business."""
    model, plain = dms_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=True, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.allclose(again(tokens(1, 5)).logits, plain(tokens(1, 5)).logits, atol=1e-5)
