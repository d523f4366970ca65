"""The small reasoning model: what is learned of a packed row, fine-tuning that resumes exactly, the commands' chain."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv.evals.problems.procedural import split_of
from sparsekv.retrofit.training import recorded
from sparsekv.studies.reasoning.__main__ import main
from sparsekv.studies.reasoning.chats import encode, prompt_ids
from sparsekv.studies.reasoning.config import load
from sparsekv.studies.reasoning.data import read
from sparsekv.studies.reasoning.rows import IGNORE, batches
from sparsekv.studies.reasoning.sft import rate, train

STUDY = """
model: {model}
families:
  - {{family: times, levels: [2, 3], share: 1}}
  - {{family: program, levels: [8], share: 1}}
tokens: 6000
chats: 20
length: 512
batch: 2
steps: 6
lr: 1.0e-3
warmup: 2
"""


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its data made beside it."""
    path = tmp_path_factory.mktemp("reasoning") / "study.yaml"
    path.write_text(STUDY.format(model=folder))
    assert main(["data", str(path), str(path.parent / "data"), "--processes", "1"]) == 0
    return path


def test_only_chains_are_learned(folder: Path):
    """Of two chains in a row, each position's label is the next token of the same chain, and no prompt's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    a, b = (encode(p, c, tokenizer, ended=True) for p, c in (("a?", "one"), ("b?", "two and three")))
    length = len(a) + len(b)
    tokens, labels, documents = next(batches([a, b], batch=1, length=length, seed=0, start=0))
    order = (
        [a, b] if tokens[0, 0] == ~a[0] and np.array_equal(documents[0] == 0, np.arange(length) < len(a)) else [b, a]
    )
    expected, plain = [], []
    for chain in order:
        ids = np.where(chain < 0, ~chain, chain)
        plain += ids.tolist()
        head = int((chain < 0).sum())
        expected += [IGNORE] * (head - 1) + ids[head:].tolist() + [IGNORE]
    assert tokens[0].tolist() == plain
    assert labels[0].tolist() == expected
    assert plain[: len(prompt_ids("a?", tokenizer))] in (prompt_ids("a?", tokenizer), prompt_ids("b?", tokenizer))
    assert (a[-1], b[-1]) == (tokenizer.eos_token_id,) * 2


def test_batches_resume(study: Path):
    chains = read(study.parent / "data")
    whole = list(itertools.islice(batches(chains, batch=2, length=512, seed=3, start=0), 5))
    later = next(batches(chains, batch=2, length=512, seed=3, start=4))
    assert all(torch.equal(x, y) for x, y in zip(whole[4], later, strict=True))


def test_data(study: Path):
    """Every chain is of the training split, and the chats are some of them."""
    chats = [json.loads(line)["messages"] for line in (study.parent / "data/chats.jsonl").read_text().splitlines()]
    assert len(chats) == 20
    assert all(split_of(user["content"]) == "train" and "ans " in chain["content"] for user, chain in chats)
    made = json.loads((study.parent / "data/data.json").read_text())["families"]
    assert sum(f["tokens"] for f in made.values()) == sum(map(len, read(study.parent / "data")))
    assert all(3000 <= family["tokens"] <= 3600 for family in made.values())


def test_training_resumes_exactly(study: Path, tmp_path: Path):
    """A run that stopped after each step of its first three ends with an undisturbed one's weights."""
    config, data = load(study, overrides=[]), study.parent / "data"
    assert train(config, data, tmp_path / "whole", seconds=1e9, say=print)
    assert [train(config, data, tmp_path / "cut", seconds=0, say=print) for _ in range(2)] == [False, False]
    assert (tmp_path / "cut/checkpoints").is_dir()
    assert train(config, data, tmp_path / "cut", seconds=1e9, say=print)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / x).state_dict() for x in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(a[name], base[name]) for name in a)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    assert not (tmp_path / "cut/checkpoints").exists()


def test_loss_falls(study: Path, tmp_path: Path):
    config = load(study, overrides=["steps=40", "lr=3e-3"])
    train(config, study.parent / "data", tmp_path, seconds=1e9, say=print)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert rate(config, 39) < rate(config, 20) < rate(config, 1)


@pytest.mark.gpu
def test_recorded_steps_give_the_losses_of_plain_ones(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str) -> list[float]:
        train(load(study, overrides=["steps=10"]), study.parent / "data", tmp_path / name, seconds=1e9, say=print)
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "WARM_UPS", 1000)
        plain = losses("plain")
    assert losses("recorded") == pytest.approx(plain, rel=1e-2)


def test_check_and_own(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """On a random model, whose chains end by chance or never."""
    model = str(tmp_path / "model")
    assert main(["sft", str(study), str(study.parent / "data"), model, "--set", "steps=1"]) == 0
    drawn = ["--samples", "2", "--tokens", "24", "--rows", "8", "--kv-memory", "16MiB"]
    out = tmp_path / "check.jsonl"
    tried = ["--tasks", "times-2", "program-8", "--temperatures", "1", "1.5", "--count", "2"]
    assert main(["check", model, str(out), *tried, *drawn]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["temperature"], line["task"]) for line in lines] == list(
        itertools.product([1, 1.5], ["times-2", "program-8"])
    )
    assert all(0 <= line[key] <= 1 for line in lines for key in ("right", "together", "ended"))
    assert all(line["problems"] == 2 and line["samples"] == 2 for line in lines)
    chats = tmp_path / "own.jsonl"
    assert main(["own", str(study), model, str(chats), "--count", "64", *drawn]) == 0
    messages = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    assert 0 < len(messages) < 128 and all(m["role"] for chat in messages for m in chat)
    assert main(["own", str(study), model, str(chats), "--count", "1", *drawn, "--tokens", "1"]) == 2
    assert "allow more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    ["families=[]", "families=[{family: chess, levels: [1], share: 1}]", "tokens=0", "colour=red", "steps=-1"],
)
def test_mistakes(study: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", str(study), str(tmp_path / "data"), "--set", change]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert not (tmp_path / "data").exists()


def test_data_must_be_there(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sft", str(study), str(tmp_path / "none"), str(tmp_path / "model")]) == 2
    assert "holds no data" in capsys.readouterr().err


def test_the_model_can_be_retrofitted(study: Path, tmp_path: Path):
    """The heads of configs/reasoning-heads.yaml, in small, on the chains' chats."""
    from sparsekv.modeling.adapter import read_adapter
    from sparsekv.retrofit.__main__ import main as retrofit

    data, model = study.parent / "data", tmp_path / "model"
    assert main(["sft", str(study), str(data), str(model)]) == 0
    small = {"batch": 2, "length": 512, "steps_per_cr": 1, "hold_steps": 2, "decay_steps": 0, "max_cr": 3, "window": 8}
    chats = f"data=[{{kind: jsonl, names: [{data / 'chats.jsonl'}], long: drop}}]"
    changes = [f"{key}={value}" for key, value in small.items()]
    changes += [f"model={model}", f"output={tmp_path / 'heads'}", chats]
    changes += ["calibration.targets=[1.5]", "calibration.rows=2", "calibration.length=64"]
    root = Path(__file__).parents[3]
    assert retrofit([str(root / "configs/reasoning-heads.yaml"), *changes]) == 0
    assert read_adapter(str(tmp_path / "heads"))[0].window == 8
