"""The trainer: what it teaches, what it stops at, and that a killed run goes on as if nothing had happened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.evals.corpus import Corpus, load_documents
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.load import load_model
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data import Blend
from sparsekv.retrofit.trainer import RetrofitTrainer, marked_fraction, newest_checkpoint, train

Configure = Callable[..., RetrofitConfig]


def prepared(config: RetrofitConfig) -> tuple[Any, Blend]:
    model, tokenizer = load_model(config.model, device=config.device)
    sparsekv.attach(model, policy="dms", window=config.window, lag=config.lag)
    rows = Blend(
        Corpus(load_documents(config.texts)[0], tokenizer),
        tokenizer,
        count=config.steps * config.batch,
        batch=config.batch,
        length=config.length,
        retrieval_share=config.retrieval_share,
        seed=config.seed,
    )
    Path(config.output).mkdir(parents=True, exist_ok=True)
    return model, rows


def trained(config: RetrofitConfig) -> tuple[Any, list[dict[str, float]]]:
    model, rows = prepared(config)
    train(model, rows, config, progress=False)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


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


def test_a_strong_pull_moves_the_ratio(configure: Configure) -> None:
    _, metrics = trained(configure(lr=0.6, steps_per_cr=1, max_cr=16, save_every=100))
    assert metrics[-1]["fraction"] > 0.4 > 0.05 > metrics[0]["fraction"]


def test_a_killed_run_goes_on_as_if_undisturbed(configure: Configure, tmp_path: Path) -> None:
    _, whole = trained(configure(output=str(tmp_path / "whole")))
    config = configure(output=str(tmp_path / "killed"))
    model, rows = prepared(config)

    class Killed(Exception):
        pass

    def row(index: int, rows: Blend = rows) -> Any:
        if index >= 5 * config.batch:  # in step 6, or while its batch is fetched ahead: after checkpoint-4
            raise Killed
        return Blend.__getitem__(rows, index)

    trainer = RetrofitTrainer(model, rows, config, progress=False)
    trainer.train_dataset = _Rows(len(rows), row, rows)
    with pytest.raises(Killed):
        trainer.train()
    half = Path(config.output) / "checkpoints" / "checkpoint-6"
    half.mkdir()  # killed while writing this one
    found = newest_checkpoint(Path(config.output))
    assert found is not None
    assert found.name == "checkpoint-4"
    _, resumed = trained(config)
    keys = ("step", "loss", "divergence", "hinge", "fraction")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in whole]


class _Rows(Blend):
    def __init__(self, count: int, row: Callable[[int], Any], rows: Blend) -> None:
        self.__dict__.update(rows.__dict__)
        self.count, self.row = count, row

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


def test_a_checkpoint_is_the_heads_and_no_more(configure: Configure) -> None:
    config = configure(max_steps=2)
    model, _ = trained(config)
    checkpoint = newest_checkpoint(Path(config.output))
    assert checkpoint is not None
    state = read_adapter(checkpoint)[1]
    parameters = [p for head in sparsekv.heads(model) for p in head.parameters()]
    assert sum(x.numel() for x in state.values()) == sum(p.numel() for p in parameters)
    assert not list(checkpoint.glob("model*"))


def test_a_loss_that_is_not_finite_stops_the_run(configure: Configure) -> None:
    config = configure()
    model, rows = prepared(config)
    trainer = RetrofitTrainer(model, rows, config, progress=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss is not finite at step 1 .*: lower lr"):
        trainer.train()


def test_heads_without_gradient_stop_the_run(configure: Configure) -> None:
    config = configure()
    model, rows = prepared(config)
    trainer = RetrofitTrainer(model, rows, config, progress=False)
    sparsekv.heads(model)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="eviction head 1 gets no gradient"):
        trainer.train()


def test_fraction_soft_and_straight_through_by_hand() -> None:
    gates = [torch.tensor([[0.0, 2.0]], requires_grad=True), torch.tensor([[-1.0, 1.0]], requires_grad=True)]
    alphas = torch.cat(gates).sigmoid()
    assert marked_fraction(gates, hard=False).item() == pytest.approx(alphas.mean().item())
    hard = marked_fraction(gates, hard=True)
    assert hard.item() == pytest.approx(2 / 4)
    assert torch.allclose(torch.autograd.grad(hard, gates[0])[0], (alphas * (1 - alphas))[:1] / 4)


@pytest.mark.parametrize("changes", [{"divergence": "kl_student_teacher"}, {"fraction": "hard"}, {"lag": 1}])
def test_options_train(configure: Configure, changes: dict[str, Any]) -> None:
    _, metrics = trained(configure(max_steps=2, **changes))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics)
