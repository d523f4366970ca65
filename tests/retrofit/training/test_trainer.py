"""The trainer: what it teaches, what it stops at, and that a killed run goes on as if nothing had happened."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import sparsekv
import tiny
from helpers import tiny_model, tokens
from retrofitting import Configure, prepared, trained, trainer_of
from sparsekv import dms
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.load import load_model
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.rows import Blend
from sparsekv.retrofit.training import checkpoint
from sparsekv.retrofit.training.distill import Distillation, Draw, marked_fractions
from sparsekv.retrofit.training.metrics import blocks, total_seconds
from sparsekv.retrofit.training.trainer import make_trainable, train


def test_lines_of_every_other_step_and_of_the_last_tell_what_a_step_took(configure: Configure) -> None:
    config = configure(lr=0.05, max_steps=5, log_every=2)
    started = time.monotonic()
    _, metrics = trained(config)
    assert [line["step"] for line in metrics] == [2, 4, 5]
    steps = [2, 2, 1]
    whole = sum(line["seconds"] * count for line, count in zip(metrics, steps, strict=True))
    assert 0 < whole <= time.monotonic() - started
    assert total_seconds(metrics) == pytest.approx(whole)
    again = configure(lr=0.05, max_steps=5, output=config.output + "-whole")
    assert [line["loss"] for line in trained(again)[1]][1::2] == [line["loss"] for line in metrics[:2]]


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


def test_a_frozen_weight_with_two_names_is_not_what_was_trained(configure: Configure) -> None:
    model = tiny_model(tie_word_embeddings=True)
    sparsekv.attach(model, policy="dms", window=4)
    make_trainable(model, configure())
    with contexts.soft(model, tau=0.1):
        names = set(checkpoint.trained_weights(Distillation(model, configure())))
    heads = {name for name, _ in model.named_parameters() if ".eviction_head." in name}
    assert names - {"quantiles"} == {f"student.{name}" for name in heads}


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
    trained_names = {"student." + name for name, p in model.named_parameters() if p.requires_grad}
    assert set(weights) == trained_names | {"quantiles"}
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


@pytest.mark.parametrize(("decay_steps", "last"), [(0, [1, 1, 1, 1, 1, 1]), (4, [1, 1, 1, 0.75, 0.5, 0.25])])
def test_the_learning_rates_fall_over_the_last_steps(configure: Configure, decay_steps: int, last: list[float]) -> None:
    config = configure(trainable="lora", decay_steps=decay_steps)
    with trainer_of(config) as trainer:
        seen = []
        step = trainer.training_step

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append([group["lr"] for group in trainer.optimizer.param_groups])
            return step(*args, **kwargs)

        trainer.training_step = spy
        trainer.train()
    for rate, rates in zip([config.lr, config.rate], zip(*seen, strict=True), strict=True):
        assert list(rates) == pytest.approx([rate * share for share in last])


def test_a_strong_pull_moves_the_ratio(configure: Configure) -> None:
    _, metrics = trained(configure(lr=0.6, steps_per_cr=1, max_cr=16, save_every=100))
    assert metrics[-1]["fraction"] > 0.4 > 0.05 > metrics[0]["fraction"]


@pytest.mark.parametrize("trainable", ["heads", "lora", "all"])
def test_a_killed_run_goes_on_as_if_undisturbed(configure: Configure, tmp_path: Path, trainable: str) -> None:
    _, whole = trained(configure(output=str(tmp_path / "whole"), trainable=trainable, decay_steps=4))
    config = configure(output=str(tmp_path / "killed"), trainable=trainable, decay_steps=4)

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
    assert len([key for key in kept if key.startswith("model.student.")]) == 2 * per_layer
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


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "kl_student_teacher"},
        {"fraction": "hard"},
        {"lag": 1},
        {"lag": 8},
        {"pull": "hinge_sum", "fraction": "hard"},
        {"pull": "bernoulli_kl"},
    ],
)
def test_options_train(configure: Configure, changes: dict[str, Any]) -> None:
    _, metrics = trained(configure(max_steps=2, **changes))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics)


@pytest.mark.parametrize("trainable", ["heads", "all"])
def test_gradient_checkpointing_changes_nothing(configure: Configure, tmp_path: Path, trainable: str) -> None:
    """The layers that run again in the backward draw the noise that they drew before."""
    runs = [
        trained(
            configure(
                output=str(tmp_path / str(on)), gradient_checkpointing=on, lr=0.05, trainable=trainable, max_steps=3
            )
        )
        for on in (False, True)
    ]
    (first, plain), (second, again) = runs
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in plain], rel=1e-6)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_step_in_parts_has_the_gradient_of_the_whole(configure: Configure, tmp_path: Path) -> None:
    """While both halves pull: a hinge that is off in one of them is each part's own."""
    runs = [
        trained(configure(output=str(tmp_path / str(parts)), accumulate=parts, lr=0.05, batch=4, max_steps=3))
        for parts in (1, 2)
    ]
    (first, plain), (second, again) = runs
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    for ours, theirs in zip(sparsekv.heads(first), sparsekv.heads(second), strict=True):
        assert torch.allclose(ours.weight, theirs.weight, atol=1e-5)


def test_the_heads_of_a_layer_decide_as_one(configure: Configure) -> None:
    config = configure(granularity="layer", lr=0.05, max_steps=3)
    model, _ = trained(config)
    for head in sparsekv.heads(model):
        assert head.weight.any()
        assert torch.equal(head.weight[0], head.weight[1]) and torch.equal(head.bias[0], head.bias[1])
    with contexts.soft(model, tau=0.1, shared=True) as gates, torch.no_grad():
        model(torch.arange(30)[None])
    assert all(torch.equal(gate[:, 0], gate[:, 1]) for gate in gates.gates.values())
    with contexts.soft(model, tau=0.1) as gates, torch.no_grad():
        model(torch.arange(30)[None])
    assert not any(torch.equal(gate[:, 0], gate[:, 1]) for gate in gates.gates.values())


def test_a_family_is_saved_on_the_way(configure: Configure) -> None:
    config = configure(family=[2, 3], lr=0.05)
    _, metrics = trained(config)
    output = Path(config.output)
    adapters = {ratio: read_adapter(output / f"cr{ratio}") for ratio in (2, 3)}
    assert [adapter.training["steps"] for adapter, _ in adapters.values()] == [2, 4]
    assert [metrics[steps - 1]["ratio_target"] for steps in (2, 4)] == pytest.approx([2, 3])
    name = "base_model.model.model.layers.0.self_attn.eviction_head.weight"
    assert not torch.equal(adapters[2][1][name], adapters[3][1][name])


def test_a_ratio_drawn_anew_shifts_the_logits_to_it(configure: Configure) -> None:
    config = configure(max_cr=2, hold_steps=12, hold="random", lr=0.05, steps_per_cr=4)
    model, metrics = trained(config)
    schedule, held = metrics[:4], metrics[4:]
    assert [line["target"] for line in schedule] == pytest.approx([1 - 1 / (1 + step / 4) for step in (1, 2, 3, 4)])
    targets = [line["target"] for line in held]
    assert len(set(targets)) == 12 and all(0 <= target < 0.5 for target in targets) and max(targets) > 0.25
    assert attachment_of(model).policy.offset == 0


@torch.no_grad()
def test_the_shift_gives_the_fraction_that_was_drawn(configure: Configure) -> None:
    """Exactly so in one layer; later ones' logits move with what earlier ones forget."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(4, 200)
    sparsekv.attach(model, policy="dms", window=8)
    tiny.random_heads(sparsekv.heads(model))
    with contexts.soft(model, tau=0.1):
        distillation = Distillation(model, configure(hold_steps=1, hold="random", fraction="hard"))

        def marked(target: float, full: float | None) -> float:
            return float(distillation(ids, Draw(seed=1, target=target, full=full))["fractions"].mean())

        full = marked(0.9, None)
        assert 0.3 < full < 0.7
        targets = [share * full for share in (0.2, 0.7, 1.0)]
        assert [marked(target, full) for target in targets] == pytest.approx(targets, abs=1 / 128)


def test_a_ratio_that_does_not_move_stops_the_run(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"does not move: 0\.\d+ 3 steps ago, 0\.\d+ now, and the target is 0\.67"):
        trained(configure(lr=1e-9, stall_steps=3, steps_per_cr=2))


def test_tensorboard_and_the_bar(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tensorboard=True, max_steps=2)
    model, rows, _ = prepared(config)
    train(model, rows, config)
    assert list((Path(config.output) / "tensorboard").glob("events*"))
    assert "divergence 0." in capsys.readouterr().err
    assert blocks([0.0, 0.5, 1.0]) == " ▄█"


def test_parts_that_do_not_divide_the_batch_are_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match="batch is 2; accumulate 3 must divide it"):
        configure(accumulate=3)


def test_a_neuron_is_faded_out_and_then_carries_the_logits(configure: Configure) -> None:
    config = configure(
        source="neuron", neuron={"fade_steps": 3}, trainable="all", lag=1, base_lr=1e-3, max_cr=2, save_every=2
    )
    assert config.steps == 5
    model, metrics = trained(config)
    assert [line["target"] for line in metrics] == pytest.approx([0, 0, 0, 1 - 1 / 1.5, 0.5])
    assert [line["hinge"] == 0 and line["fraction"] == 0 for line in metrics] == [True] * 3 + [False] * 2
    assert 0 < metrics[0]["divergence"] < metrics[2]["divergence"]  # a third of the channel is gone, then all of it
    assert metrics[3]["fraction"] > 0
    with pytest.raises(ValueError, match="its queries carry the logits"):
        sparsekv.heads(model)
    attached = attachment_of(model)
    assert (attached.keep, attached.policy.offset) == (0, 0)


@torch.no_grad()
def test_the_channel_fades_before_and_after_rope(configure: Configure) -> None:
    """All of it kept is the plain model; none is what inference does; between them, between."""
    model, plain, ids = tiny_model(), tiny_model(), tokens(1, 20)
    sparsekv.attach(model, policy="dms", window=4, neuron=dms.NeuronSource())
    attached, outs = attachment_of(model), []
    for keep in (1.0, 0.5, 0.0):
        attached.keep = keep
        with contexts.dense(model):
            outs.append(model(ids).logits)
    assert torch.allclose(outs[0], plain(ids).logits, atol=1e-5)
    assert 0 < (outs[1] - outs[0]).norm() < (outs[2] - outs[0]).norm()
    with contexts.original(model):
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = trained(configure(output=str(tmp_path / "whole")))
    config, save = configure(), checkpoint.dcp_save

    def full(*args: Any, checkpoint_id: Path, **kwargs: Any) -> None:
        if "checkpoint-4" in str(checkpoint_id):
            checkpoint_id.mkdir(parents=True)
            raise OSError(28, "No space left on device")
        save(*args, checkpoint_id=checkpoint_id, **kwargs)

    monkeypatch.setattr(checkpoint, "dcp_save", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device.*; make room there") as caught:
        trained(config)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    found = checkpoint.newest(Path(config.output))
    assert found is not None and found.name == "checkpoint-2"
    _, resumed = trained(config)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def dmc_run(configure: Configure, **changes: Any) -> RetrofitConfig:
    settings: dict[str, Any] = {
        "policy": "dmc",
        "source": "neuron",
        "neuron": {"fade_steps": 5},
        "trainable": "all",
        "lag": 1,
        "window": 12,
        "pull": "hinge_text",
        "fraction": "hard",
        "base_lr": 1e-3,
        "length": 256,
    }
    return configure(**(settings | changes))


def test_dmc_fades_clears_and_learns_to_merge(configure: Configure) -> None:
    """The channel is gone over four fifths of the first stage; then decisions start at the offset and rise."""
    config = dmc_run(configure, max_cr=2, steps_per_cr=8, hold_steps=22)
    model, metrics = trained(config)
    fading, merging = metrics[:5], metrics[5:]
    assert [line["target"] for line in fading] == [0] * 5
    assert all(line["fraction"] == 0 for line in fading)
    assert fading[3]["divergence"] > fading[0]["divergence"] > 0
    assert merging[0]["fraction"] < 0.05
    assert merging[-1]["fraction"] > 0.4
    assert merging[-1]["loss"] < max(line["loss"] for line in merging)
    assert merging[-1]["hinge"] < 0.1
    attached = attachment_of(model)
    assert (attached.policy.name, attached.keep, attached.policy.offset) == ("dmc", 0, 0)


def test_the_channel_is_cleared_when_it_is_gone(configure: Configure) -> None:
    def rows(model: Any) -> list[torch.Tensor]:
        attentions = [layer.self_attn for layer in model.model.layers]
        return [p.weight.view(-1, 8, 32)[:, 7] for a in attentions for p in (a.q_proj, a.k_proj)]

    before, _ = trained(dmc_run(configure, max_steps=5, output=str(configure().output) + "-a"))
    assert all(row.any(-1).all() for row in rows(before))
    after, _ = trained(dmc_run(configure, max_steps=6, output=str(configure().output) + "-b"))
    assert max(row.abs().max().item() for row in rows(after)) < 2 * 1e-3  # one step of Adam from 0


def test_each_text_of_a_batch_is_pulled_for_itself(configure: Configure) -> None:
    with trainer_of(dmc_run(configure, neuron={"fade_steps": 0})) as trainer:
        ids = next(iter(trainer.get_train_dataloader()))["input_ids"][:, :128]
        made = trainer.model(ids, Draw(seed=1, target=0.5))
        gates = attachment_of(trainer.model.student).gates
        merged = torch.stack([gate.view(2, 128, -1) for gate in gates.gates.values()]) > 0
        expected = (0.5 - merged.float().mean(dim=(0, 2, 3))).clamp(min=0).mean()
    assert made["pull"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_killed_run_of_dmc_goes_on_as_if_undisturbed(configure: Configure, tmp_path: Path) -> None:
    """Killed at the step before which the channel is cleared."""
    settings = {"neuron": {"fade_steps": 2}, "save_every": 2}
    _, whole = trained(dmc_run(configure, output=str(tmp_path / "whole"), max_steps=4, **settings))
    config = dmc_run(configure, output=str(tmp_path / "killed"), max_steps=4, **settings)
    with trainer_of(config) as trainer:
        step = trainer.training_step

        def killed(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 2:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        trainer.training_step = killed
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    _, resumed = trained(config)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
