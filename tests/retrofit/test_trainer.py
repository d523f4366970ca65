"""The trainer: what it teaches, what it stops at, and that a killed run goes on as if nothing had happened."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import sparsekv
from sparsekv import dms
from sparsekv.modeling import modes
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.load import load_model
from sparsekv.retrofit import checkpoint
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data import Blend, blend
from sparsekv.retrofit.distill import Draw, marked_fractions
from sparsekv.retrofit.documents import read_all
from sparsekv.retrofit.run import load_for_training, load_teacher
from sparsekv.retrofit.trainer import RetrofitTrainer, train

Configure = Callable[..., RetrofitConfig]


def prepared(config: RetrofitConfig) -> tuple[Any, Blend, Any]:
    """(student, rows, teacher)"""
    model, tokenizer = load_for_training(config)
    documents = read_all(config.data, tokenizer, model=config.model, seed=config.seed)
    rows = blend(documents, tokenizer, count=config.steps * config.batch, length=config.length, seed=config.seed)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    return model, rows, load_teacher(config, tokenizer)


def trained(config: RetrofitConfig) -> tuple[Any, list[dict[str, Any]]]:
    model, rows, teacher = prepared(config)
    train(model, rows, config, teacher=teacher, progress=False)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


@contextmanager
def trainer_of(config: RetrofitConfig) -> Iterator[RetrofitTrainer]:
    model, rows, teacher = prepared(config)
    with modes.soft(model, tau=config.tau):
        yield RetrofitTrainer(model, rows, config, teacher=teacher, progress=False)


def test_steps_move_the_heads_and_only_the_heads(configure: Configure) -> None:
    config = configure(lr=0.05)
    before = {name: p.clone() for name, p in load_model(config.model, device="cpu")[0].named_parameters()}
    model, metrics = trained(config)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [round(line["ratio_target"], 9) for line in metrics] == [1.5, 2, 2.5, 3, 3.5, 4]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["divergence"] + line["hinge"])
        assert line["hinge"] == pytest.approx(max(0, line["target"] - line["fraction"]), abs=1e-6)
        assert line["divergence"] >= 0
        assert line["seconds"] > 0
    assert metrics[-1]["fraction"] > metrics[0]["fraction"]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(head.weight.any() and head.weight.dtype == torch.float32 for head in sparsekv.heads(model))
    assert not model.training


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_what_is_trained_moves_and_the_teacher_does_not(configure: Configure, trainable: str) -> None:
    config = configure(max_steps=3, trainable=trainable, base_lr=0.01)
    model, rows, teacher = prepared(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    frozen = {} if teacher is None else {name: p.clone() for name, p in teacher.named_parameters()}
    weights = train(model, rows, config, teacher=teacher, progress=False)
    after = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    heads = {name for name in before if "eviction_head" in name}
    assert moved == (set(before) if trainable == "all" else heads)
    assert all(torch.equal(p, frozen[name]) for name, p in teacher.named_parameters()) if teacher is not None else True
    lora = {name: p for name, p in after.items() if ".lora_" in name}
    assert len(lora) == (0 if trainable == "all" else 2 * 7 * 2)
    assert all(p.any() and p.dtype == torch.float32 for p in lora.values())
    assert set(weights) == {"student." + name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, weights["student." + name]) for name, p in model.named_parameters() if p.requires_grad)


def test_the_first_step_of_every_recipe_has_the_same_loss(configure: Configure, tmp_path: Path) -> None:
    """LoRA begins as nothing, and a copy of the model teaches what the model itself does."""
    runs = {
        trainable: trained(configure(output=str(tmp_path / trainable), trainable=trainable, max_steps=1))[1][0]
        for trainable in ("heads", "lora", "all")
    }
    for line in runs.values():
        assert line["divergence"] == pytest.approx(runs["heads"]["divergence"], rel=1e-4)
        assert line["fractions"] == runs["heads"]["fractions"]


def test_the_whole_divergence_has_the_gradient_of_plain_autograd(configure: Configure) -> None:
    """Of every weight, the output head's too: chunks and recomputing change nothing."""
    config = configure(trainable="all")
    with trainer_of(config) as trainer:
        distillation = trainer.model
        distillation.split.chunk = 100
        ids = next(iter(trainer.get_train_dataloader()))["input_ids"][:, :128]
        draw = Draw(seed=3, target=0.5)
        distillation(ids, draw)["divergence"]
        loss = distillation(ids, draw)["loss"]
        loss.backward()
        ours = {name: p.grad.clone() for name, p in distillation.student.named_parameters()}
        distillation.zero_grad()
        with torch.no_grad():
            teacher = distillation.teacher(ids).logits
        gates = attachment_of(distillation.student).gates
        gates.begin(seed=3)
        student = distillation.student(ids).logits
        plain = dms.kl_teacher_student(teacher, student).mean()
        plain = plain + dms.hinge(marked_fractions(gates.gates, hard=False).mean(), 0.5)
        plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in distillation.student.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-6, rtol=1e-4), name


def test_a_strong_pull_moves_the_ratio(configure: Configure) -> None:
    _, metrics = trained(configure(lr=0.6, steps_per_cr=1, max_cr=16, save_every=100))
    assert metrics[-1]["fraction"] > 0.4 > 0.05 > metrics[0]["fraction"]


@pytest.mark.parametrize("trainable", ["heads", "lora", "all"])
def test_a_killed_run_goes_on_as_if_undisturbed(configure: Configure, tmp_path: Path, trainable: str) -> None:
    _, whole = trained(configure(output=str(tmp_path / "whole"), trainable=trainable))
    config = configure(output=str(tmp_path / "killed"), trainable=trainable)

    class Killed(Exception):
        pass

    with trainer_of(config) as trainer:
        rows = trainer.train_dataset
        assert isinstance(rows, Blend)

        def row(index: int) -> Any:
            if index >= 5 * config.batch:  # in step 6, or while its batch is fetched ahead: after checkpoint-4
                raise Killed
            return Blend.__getitem__(rows, index)

        trainer.train_dataset = _Rows(len(rows), row, rows)
        with pytest.raises(Killed):
            trainer.train()
    half = Path(config.output) / "checkpoints" / "checkpoint-6"
    half.mkdir()  # killed while writing this one
    found = checkpoint.newest(Path(config.output))
    assert found is not None
    assert found.name == "checkpoint-4"
    _, resumed = trained(config)
    keys = ("step", "loss", "divergence", "hinge", "fraction")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in whole]
    assert len({line["divergence"] for line in whole}) == 6


class _Rows(Blend):
    def __init__(self, count: int, row: Callable[[int], Any], rows: Blend) -> None:
        self.__dict__.update(rows.__dict__)
        self.count, self.row = count, row

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


@pytest.mark.parametrize(("trainable", "per_layer"), [("heads", 2), ("lora", 2 + 7 * 2)])
def test_a_checkpoint_is_what_is_trained_and_no_more(configure: Configure, trainable: str, per_layer: int) -> None:
    config = configure(max_steps=2, trainable=trainable)
    trained(config)
    found = checkpoint.newest(Path(config.output))
    assert found is not None
    kept = FileSystemReader(found / checkpoint.WEIGHTS).read_metadata().state_dict_metadata
    assert len([key for key in kept if key.startswith("model.")]) == 2 * per_layer
    assert len([key for key in kept if key.endswith(".exp_avg")]) == 2 * per_layer


def test_a_loss_that_is_not_finite_stops_the_run(configure: Configure) -> None:
    with trainer_of(configure()) as trainer:
        with torch.no_grad():
            trainer.model.student.model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"the loss is not finite at step 1 .*: lower lr"):
            trainer.train()


def test_heads_without_gradient_stop_the_run(configure: Configure) -> None:
    with trainer_of(configure()) as trainer:
        sparsekv.heads(trainer.model.student)[1].requires_grad_(False)
        with pytest.raises(ValueError, match="eviction head 1 gets no gradient"):
            trainer.train()


def test_fraction_soft_and_straight_through_by_hand() -> None:
    gates = [torch.tensor([[0.0, 2.0]], requires_grad=True), torch.tensor([[-1.0, 1.0]], requires_grad=True)]
    alphas, by_layer = torch.cat(gates).sigmoid(), {0: gates[0], 2: gates[1]}
    assert torch.allclose(marked_fractions(by_layer, hard=False), alphas.mean(1))
    hard = marked_fractions(by_layer, hard=True)
    assert hard.tolist() == pytest.approx([1 / 2, 1 / 2])
    assert torch.allclose(torch.autograd.grad(hard.mean(), gates[0])[0], (alphas * (1 - alphas))[:1] / 4)


@pytest.mark.parametrize("changes", [{"divergence": "kl_student_teacher"}, {"fraction": "hard"}, {"lag": 1}])
def test_options_train(configure: Configure, changes: dict[str, Any]) -> None:
    _, metrics = trained(configure(max_steps=2, **changes))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics)
