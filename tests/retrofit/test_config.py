"""Retrofit configuration: YAML round trip, overrides, and one sentence for each mistake."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sparsekv.retrofit.config import load_config, parse_config, save_config
from sparsekv.retrofit.data.config import Source

ROOT = Path(__file__).parents[2]
MINIMAL = {"model": "m", "output": "o", "data": [{"kind": "text", "names": ["t.txt"]}, {"kind": "retrieval"}]}


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-lora"])
def test_a_recipe_is_the_one_that_made_the_shipped_adapter(name: str) -> None:
    recipe, made = load_config(ROOT / "configs" / f"{name}.yaml"), load_config(ROOT / "adapters" / name / "config.yaml")
    assert made.commit is not None
    assert recipe == replace(made, output=recipe.output, commit=None)


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "lr": "1e-4", "max_steps": 20, "calibration": {"targets": [2, 4]}})
    assert config.lr == 1e-4
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_overrides_win_and_reach_inside(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    overrides = ["max_steps=20", "calibration.targets=[2, 3]", "evaluation.items=1", "lr=1e-4"]
    overrides.append("data=[{kind: text, names: a.txt, weight: 2}]")
    config = load_config(tmp_path / "c.yaml", overrides=overrides)
    assert (config.max_steps, config.steps, config.calibration.targets) == (20, 20, [2.0, 3.0])
    assert config.final_cr == 1.2
    assert config.evaluation is not None
    assert (config.evaluation.items, config.lr) == (1, 1e-4)
    assert config.data == [Source(kind="text", names=["a.txt"], weight=2.0)]
    assert load_config(tmp_path / "c.yaml", overrides=["evaluation=null"]).evaluation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("windw=3", r"unknown key windw; the keys are model, output, data, .*window"),
        ("calibration.rowz=3", r"unknown key calibration\.rowz; the keys are calibration\.targets, calibration\.rows"),
        ("window=0", "window is 0; it counts the current token"),
        ("window=64.5", "window is 64.5; it is a whole number"),
        ("window=1024", "length is 2048 and window 1024"),
        ("pieces=[]", "pieces is empty"),
        ("pieces=[3]", "pieces has 3; it must divide the length, 2048, into texts of over two windows"),
        ("pieces=[1, 16]", "pieces has 16"),
        ("lag=2", "lag is 2; it is 0, 1 or the window"),
        ("granularity=token", "granularity is 'token'; use one of head, layer"),
        ("pull=hard", "pull is 'hard'; use one of hinge_mean, hinge_sum, hinge_text, bernoulli_kl"),
        ("pull=hinge_text", "pull: hinge_text counts hard: use fraction: hard"),
        ("policy=dmr", "policy is 'dmr'; use one of dms, dmc"),
        ("policy=dmc", "use source: neuron, trainable: all and lag: 1"),
        ("hold=low", "hold is 'low'; use one of max, random"),
        ("decay_steps=-1", "decay_steps is -1; use 0 or more"),
        ("hold_steps=-1", "hold_steps is -1; use 0 or more"),
        ("family=[2, 9]", r"family has \[9\.0\]; the run passes ratios above 1 up to 8"),
        ("stall_steps=0", "stall_steps is 0; use at least 1"),
        ("tensor_parallel=0", "tensor_parallel is 0; use at least 1"),
        ("gradient_checkpointing=2", "gradient_checkpointing is 2; it is true or false"),
        ("lr=true", "lr is True; it is a number"),
        ("max_cr=0.5", "max_cr is 0.5; a ratio is tokens seen over tokens held"),
        ("calibration.targets=[0.5]", "targets has 0.5; a ratio is tokens seen over tokens held"),
        ("evaluation.ratios=[0.5]", "ratios has 0.5"),
        ("tau=0", "tau is 0; use more than 0"),
        ("lr=fast", "lr is 'fast'; it is a number"),
        ("batch=0", "batch is 0; use at least 1"),
        ("length=200", "length is 200; retrieval needs rows of 256 tokens or more"),
        ("trainable=some", "trainable is 'some'; use one of heads, lora, all"),
        ("lora.rank=0", "lora.rank is 0; use at least 1"),
        ("lora.targets=[]", "lora.targets is empty"),
        ("base_lr=-1", "base_lr is -1; use more than 0"),
        ("divergence=forward", "divergence is 'forward'; use one of kl_teacher_student, kl_student_teacher"),
        ("data=[]", "data is empty; name a source to train on"),
        ("data=[{kind: retrieval}]", "retrieval needs text around its facts: give it names"),
        ("data=[{kind: txt}]", "a source of kind 'txt'; use one of text, jsonl"),
        ("data=[{kind: text}]", "a text source needs names"),
        ("data=[{kind: text, names: [a], weight: 0}]", "the weight of a text source is 0; use more than 0"),
        ("data=[{kind: text, names: [a], dataset: b}]", "a text source has no dataset; it takes names"),
        ("data=[{kind: huggingface}]", "a huggingface source needs a dataset"),
        ("data=[{kind: jsonl, names: [a], long: never}]", "long is 'never'; use one of cut, drop, refuse"),
        ("data=[{kind: huggingface, dataset: a, streaming: 3}]", r"data\.streaming is 3; it is true or false"),
        ("data=[{kind: text, nams: [a]}]", r"unknown key data\.nams"),
        ("model", "--set model has no '='"),
        ("model=[a]", r"model is \['a'\]; it is a text"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path / "c.yaml", overrides=[override])
    assert "\n" not in str(caught.value)


def test_missing_files_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="the configuration lacks data"):
        parse_config({"model": "m", "output": "o"})
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        load_config(tmp_path / "bad.yaml")


def test_every_committed_configuration_loads() -> None:
    folder = Path(__file__).parents[2] / "configs"
    names = [path for path in folder.glob("*.yaml") if not path.name.startswith("ablations")]
    assert all(load_config(path).data for path in names)
    assert len(names) >= 2


def test_a_key_that_is_written_twice_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: m\nevaluation:\n  items: 1\n  rows: 2\n  items: 3\n")
    with pytest.raises(ValueError, match=r"c.yaml is not YAML: the key items appears twice, the second time in line 5"):
        load_config(tmp_path / "c.yaml")
