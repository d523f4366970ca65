"""NVIDIA's checkpoints, synthetic and small, in all their formats, against NVIDIA's formulas written out."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sparsekv
from helpers import tiny_model, tokens
from sparsekv.dms import NeuronSource, visible
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.importers import convert, foreign
from written_out import Neuron, decoder, rms_norm

W = 3
"""NVIDIA's dms_window_size."""
SETTINGS = {"dms_window_size": W, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}
FORMATS = ["whole", "shards", "heads alone", "raw trainer files"]


def save_model(folder, state, config, **entries):
    """A model folder; entries go into config.json."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    raw = {**json.loads((folder / "config.json").read_text()), **entries}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_shards(folder, state):
    """Replace the one file by three and their index."""
    (folder / "model.safetensors").unlink()
    names, where = sorted(state), {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[shard::3]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[shard::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


class Student:
    """A Qwen3 model with norms far from one, and trained heads on it."""

    def __init__(self, folder, *, bias=False, **settings):
        model = tiny_model("Qwen3", attention_bias=bias)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 2.0, generator=generator)
            if "bias" in name:
                parameter.data.normal_(generator=generator)
        self.config = model.config
        self.body = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        self.heads = {}
        for layer in range(2):
            part = f"model.layers.{layer}.self_attn.dms_proj_alpha"
            self.heads[f"{part}.weight"] = 0.02 * torch.randn(2, 32, generator=generator)
            self.heads[f"{part}_norm.weight"] = torch.rand(32, generator=generator) + 0.5
            if bias:
                self.heads[f"{part}.bias"] = 0.05 * torch.randn(2, generator=generator)
        self.folder, self.base = folder / "student", folder / "base"
        self.settings = {**SETTINGS, "dms_separate_alpha": True, **settings}
        save_model(self.base, self.body, self.config)

    def save(self, form):
        """Writes the checkpoint and returns the arguments of `convert`."""
        if form in ("whole", "shards"):
            auto = {"AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS"}
            state = self.body | self.heads
            save_model(self.folder, state, self.config, **self.settings, auto_map=auto)
            if form == "shards":
                save_shards(self.folder, state)
            return {"src": str(self.folder)}
        if form == "heads alone":
            save_model(self.folder, self.heads, self.config, **self.settings)
            return {"src": str(self.folder), "base": str(self.base)}
        inner = self.folder / "checkpoint-3"
        inner.mkdir(parents=True)
        both = {f"student_model.{n}": t for n, t in (self.body | self.heads).items()}
        both |= {f"teacher_model.{n}": t for n, t in self.body.items()}
        torch.save(both, inner / "pytorch_model.bin")
        section = {key.removeprefix("dms_"): value for key, value in self.settings.items() if key != "dms_cr"}
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"dms": {**section, "initial_cr": 1, "final_cr": 8}}))
        return {"src": str(inner), "base": str(self.base)}

    def z(self, layer, residual):
        """NVIDIA's logits: 100 * proj(RMSNorm_a(residual)) - 5."""
        part = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        weight, norm = (self.heads[f"{part}{end}.weight"].double() for end in ("", "_norm"))
        bias = self.heads.get(f"{part}.bias", torch.zeros(2)).double()
        return 100 * (rms_norm(residual, norm, self.config.rms_norm_eps) @ weight.T + bias) - 5


def load(config, adapter):
    """The adapter on its own base model, loaded by plain Transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float64)
    sparsekv.attach(model, adapter=str(adapter))
    return model


def assert_same(model, want, ids):
    """Marks, logits and outputs of an attached model, whole and through the cache."""
    assert 0.1 < want.marks.double().mean() < 0.9 and want.z.abs().min() > 1e-3, "the test must decide clearly"
    trace = sparsekv.inspect(model, ids[None])
    assert torch.equal(trace.marks, want.marks)
    torch.testing.assert_close(trace.logits[..., :-1].double(), want.z[..., 1:], atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        cache = sparsekv.SparseCache(model, page_size=2)
        pieces = [
            model(piece[None], past_key_values=cache).logits[0] for piece in ids.split([20] + [1] * (len(ids) - 20))
        ]
        for got in (model(ids[None], use_cache=False).logits[0], torch.cat(pieces)):
            torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "attention_bias"])
@pytest.mark.parametrize("form", FORMATS)
def test_trained_heads_equal_the_formula(form, bias, tmp_path):
    student, ids = Student(tmp_path, bias=bias), tokens(1, 33)[0]
    config = convert("nvidia", **student.save(form), dst=tmp_path / "adapter")
    assert (config.source, config.lag, config.window, config.training["cr"]) == ("linear", 1, W + 1, 8)
    want = decoder(student.config, student.body, ids, window=W + 1, lag=1, source=student.z)
    assert_same(load(config, tmp_path / "adapter"), want, ids)


def test_one_decision_per_layer(tmp_path):
    student, ids = Student(tmp_path, dms_alpha_per="layer"), tokens(1, 33)[0]
    config = convert("nvidia", **student.save("whole"), dst=tmp_path / "adapter")

    def first(layer, residual):
        return student.z(layer, residual)[:, :1].expand(-1, 2)

    want = decoder(student.config, student.body, ids, window=W + 1, lag=1, source=first)
    assert_same(load(config, tmp_path / "adapter"), want, ids)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_neuron_source_equals_the_formula(sharded, tmp_path):
    student, ids = Student(tmp_path), tokens(1, 33)[0]
    save_model(tmp_path / "dms", student.body, student.config, **{**SETTINGS, "dms_initial_alpha_offset": 20.0})
    if sharded:
        save_shards(tmp_path / "dms", student.body)
    config = convert("nvidia", str(tmp_path / "dms"), dst=tmp_path / "adapter")
    assert (config.lag, config.window) == (1, W + 1)
    assert config.neuron == NeuronSource(channel=-1, scale=100.0, offset=-20.0, rezero=True)
    assert read_adapter(tmp_path / "adapter") == (config, {})
    source = Neuron(scale=100, shift=20, rezero=True)
    want = decoder(student.config, student.body, ids, window=W + 1, lag=1, source=source)
    assert_same(load(config, tmp_path / "adapter"), want, ids)


@torch.no_grad()
def test_a_marked_token_is_seen_for_as_long_as_nvidia_says(tmp_path):
    """q - k <= W, seen from outside: with one layer and everything marked, token 0 moves the outputs up to W."""
    model = tiny_model("Qwen3", num_hidden_layers=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(tmp_path / "dms", state, model.config, **{**SETTINGS, "dms_initial_alpha_offset": -1e4})
    config = convert("nvidia", str(tmp_path / "dms"), dst=tmp_path / "adapter")
    attached = load(config, tmp_path / "adapter")
    ids = tokens(1, 12)
    other = torch.cat([ids[:, :1] % 60 + 1, ids[:, 1:]], 1)
    a, b = (attached(x, past_key_values=sparsekv.SparseCache(attached)).logits[0] for x in (ids, other))
    assert (a != b).any(-1).tolist() == [q <= W for q in range(12)]


def test_the_published_window_of_512_is_513(tmp_path):
    student = Student(tmp_path, dms_window_size=512)
    window = convert("nvidia", **student.save("whole"), dst=tmp_path / "adapter").window
    query, marked = torch.tensor([512, 513]), torch.tensor(True)
    assert visible(query, torch.tensor(0), marked, window).tolist() == [True, False]


def test_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    student, read = Student(tmp_path), []
    arguments = student.save("shards")
    real = foreign._Lazy.__getitem__
    monkeypatch.setattr(foreign._Lazy, "__getitem__", lambda self, name: read.append(name) or real(self, name))
    convert("nvidia", **arguments, dst=tmp_path / "adapter")
    assert read and all("dms_proj_alpha" in name or "input_layernorm" in name for name in read)


# Bad input: one sentence each, and nothing written


def refuse(sentence, tmp_path, src, **options):
    with pytest.raises(ValueError, match=sentence):
        convert("nvidia", str(src), dst=tmp_path / "adapter", **options)
    assert not list(tmp_path.glob("adapter*"))


def test_refuses_damaged_files(tmp_path):
    student = Student(tmp_path)
    student.save("shards")
    shard = student.folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuse(r"is damaged: model-00002-of-00003.safetensors cannot be read", tmp_path, student.folder)
    shard.unlink()
    refuse(r"is truncated: .* names model-00002-of-00003.safetensors", tmp_path, student.folder)
    shutil.copy(student.folder / "model-00001-of-00003.safetensors", shard)
    refuse(r"is truncated: model-00002-of-00003.safetensors has no", tmp_path, student.folder)
    (student.folder / "config.json").write_text('{"model_type": "qw')
    refuse(r"config.json is damaged", tmp_path, student.folder)


def test_refuses_a_damaged_trainer_file(tmp_path):
    arguments = Student(tmp_path).save("raw trainer files")
    file = tmp_path / "student" / "checkpoint-3" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    refuse(r"is damaged: pytorch_model.bin cannot be read", tmp_path, **arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda heads: heads.pop("model.layers.1.self_attn.dms_proj_alpha.weight"), "truncated: it has no"),
        (lambda heads: heads.pop("model.layers.1.self_attn.dms_proj_alpha_norm.weight"), "truncated: it has no"),
        (lambda heads: heads.clear(), "truncated: its configuration speaks of"),
        (
            lambda heads: heads.update({"model.layers.0.self_attn.dms_proj_alpha.weight": torch.zeros(4, 32)}),
            r"of shape \(4, 32\), and its model needs \(2, 32\)",
        ),
        (
            lambda heads: heads["model.layers.0.self_attn.dms_proj_alpha.weight"].fill_(torch.nan),
            "cannot be folded: layer 0 has NaN",
        ),
    ],
)
def test_refuses_incomplete_heads(change, sentence, tmp_path):
    student = Student(tmp_path)
    change(student.heads)
    refuse(sentence, tmp_path, **student.save("whole"))


def test_asks_for_the_base_where_the_checkpoint_is_not_whole(tmp_path):
    for form, sentence in (("heads alone", "pass it as base"), ("raw trainer files", "pass the model that it was")):
        student = Student(tmp_path / form)
        refuse(sentence, tmp_path, student.save(form)["src"])


def test_refuses_another_base(tmp_path):
    student = Student(tmp_path)
    arguments = student.save("whole") | {"base": str(tmp_path / "other")}
    moved = {name: t + 0.1 if "input_layernorm" in name else t for name, t in student.body.items()}
    save_model(tmp_path / "other", moved, student.config)
    refuse("was not trained from .*other, or not with its weights frozen", tmp_path, **arguments)
    shutil.rmtree(tmp_path / "other")
    deeper = tiny_model("Qwen3", num_hidden_layers=3)
    save_model(tmp_path / "other", dict(deeper.state_dict()), deeper.config)
    refuse("it is of another size", tmp_path, **arguments)


def test_refuses_what_is_not_nvidias(tmp_path):
    student = Student(tmp_path)
    refuse("is not a DMS checkpoint of NVIDIA's", tmp_path, student.base)
    save_model(tmp_path / "gemma", student.body, tiny_model("Gemma3").config, **SETTINGS)
    refuse("only llama and qwen3 can be converted", tmp_path, tmp_path / "gemma")
    (tmp_path / "empty").mkdir()
    refuse("is no checkpoint: it has no safetensors", tmp_path, tmp_path / "empty")
    refuse("there is no checkpoint", tmp_path, "./no/such/place")


def test_refuses_settings_that_leave_open_what_is_meant(tmp_path):
    student = Student(tmp_path)
    student.settings = {}
    refuse("does not say how its heads are to be read", tmp_path, **student.save("heads alone"))
    for name, entries, sentence in (
        ("a", {"dms_cr": 8}, "the window size is None"),
        ("b", {**SETTINGS, "dms_alpha_scale": "100"}, "the scale of its logits is '100'"),
        ("c", {**SETTINGS, "dms_alpha_per": "layer"}, "once per layer from its queries"),
    ):
        save_model(tmp_path / name, student.body, student.config, **entries)
        refuse(sentence, tmp_path, tmp_path / name)
    save_model(tmp_path / "d", student.body, student.config, **SETTINGS)
    refuse("leave out base", tmp_path, tmp_path / "d", base=str(student.base))


def test_refuses_an_unknown_kind_and_a_file_as_target(tmp_path):
    with pytest.raises(ValueError, match="unknown kind of checkpoint 'amd'; use one of nvidia, fastdms"):
        convert("amd", "x", dst=tmp_path / "adapter")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        convert("nvidia", "x", dst=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
