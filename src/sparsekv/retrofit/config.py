"""A retrofit in one YAML file: frozen dataclasses, unknown keys refused, every value checked before a step is made.

steps_per_cr and max_cr give the schedule of arXiv 2506.05345: the target ratio rises by one every `steps_per_cr` steps
up to `max_cr`, so a run has (max_cr - 1) * steps_per_cr steps unless max_steps stops it earlier.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsekv.evals.settings import CalibrationConfig, EvaluationConfig
from sparsekv.retrofit.data.config import Source, check_data
from sparsekv.retrofit.parse import parse, read_yaml

POLICIES = ("dms", "dmc")
DIVERGENCES = ("kl_teacher_student", "kl_student_teacher")
FRACTIONS = ("soft", "hard")
TRAINABLE = ("heads", "lora", "all")
GRANULARITIES = ("head", "layer")
SOURCES = ("linear", "neuron")
PULLS = ("hinge_mean", "hinge_sum", "hinge_text", "bernoulli_kl")
HOLDS = ("max", "random")
BASE_LR = {"lora": 5e-4, "all": 3e-5}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEVICES = ("auto", "cpu", "cuda")


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    _need(value in known, f"{name} is {value!r}; use one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank weights of `trainable: lora`."""

    rank: int = 16
    alpha: int = 32
    """The weights are scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR))
    """Names of the linear modules that get them; those of a layer's attention and MLP in Llama and Qwen."""

    def __post_init__(self) -> None:
        _need(self.rank >= 1, f"lora.rank is {self.rank}; use at least 1")
        _need(self.alpha >= 1, f"lora.alpha is {self.alpha}; use at least 1")
        _need(bool(self.targets), "lora.targets is empty; name modules such as q_proj, v_proj")


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """The channel of `source: neuron`, and how the model is taught to do without it."""

    channel: int = -1
    """Of the first query head of each group; negative from the end."""
    scale: float = 100.0
    offset: float = -5.0
    fade_steps: int = 2000
    """First, with eviction off, the channel is scaled by 1 - step / fade_steps; then the schedule begins."""

    def __post_init__(self) -> None:
        _need(self.fade_steps >= 0, f"neuron.fade_steps is {self.fade_steps}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class RetrofitConfig:
    """Everything that decides a run."""

    model: str
    """An embedded model's name, a folder, or a hub id."""
    output: str
    """The adapter's folder; the resolved config, metrics and checkpoints go there too."""
    data: list[Source]
    """What it is trained on: a blend of sources; see data_config.py."""
    policy: str = "dms"
    """dms, or dmc: tokens merge into the slot before; with source: neuron, trainable: all and lag: 1."""
    trainable: str = "heads"
    """heads: the base is frozen; lora: low-rank weights beside the heads; all: every weight."""
    teacher: str | None = None
    """Another model to learn from, with the same vocabulary. null: the base model itself."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    source: str = "linear"
    """linear: eviction heads; neuron: a channel of the queries carries the logits, which all weights learn."""
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    granularity: str = "head"
    """head: each KV head decides; layer: the KV heads of a layer decide as one."""
    window: int = 64
    """dms: tokens that every query sees, the current one included; dmc: tokens that a mean reaches back in training."""
    lag: int = 0
    """0, or 1: the next token decides; or the window, immediate eviction, for comparisons without a cache."""
    tau: float = 0.1
    steps_per_cr: int = 100
    max_cr: float = 8.0
    hold_steps: int = 0
    """Steps after the schedule has reached max_cr."""
    hold: str = "max"
    """Their target. max: max_cr; random: a ratio drawn for each step, each octave as often, the logits shifted."""
    decay_steps: int = 0
    """Steps over which the learning rates fall to nothing, the last of the run."""
    max_steps: int | None = None
    family: list[float] = field(default_factory=list)
    """Ratios to save on the way, as cr2/, cr3/ ... in the output folder."""
    batch: int = 16
    """Rows of an optimiser step, over all processes."""
    accumulate: int = 1
    """Parts that a process computes its rows in, one after the other."""
    tensor_parallel: int = 1
    """Processes that share one model, each with its part of every layer: 1, or all there are."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward: less memory, a third more time."""
    length: int = 2048
    """Tokens per row of a batch."""
    pieces: list[int] = field(default_factory=lambda: [1])
    """Into how many texts of equal length a source's rows are cut, in turn: [1, 2], every other row into two."""
    lr: float = 3e-3
    """Of the eviction heads."""
    base_lr: float | None = None
    """Of LoRA or of all other weights. null: 5e-4 for lora, 3e-5 for all."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest gradient norm."""
    divergence: str = "kl_teacher_student"
    pull: str = "hinge_mean"
    """Towards the target: hinge_mean; hinge_sum, over a row's layers, heads and tokens as in DMS's paper; hinge_text,
    each row for itself as in DMC, hard; bernoulli_kl, two-sided."""
    fraction: str = "soft"
    """What is pulled: the mean of soft alpha, or of hard marks with alpha's gradient (straight-through)."""
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl; the last step has one."""
    stall_steps: int = 200
    """Stop where the fraction of marks has not risen over so many steps though it is below the target."""
    tensorboard: bool = False
    """Write output/tensorboard."""
    device: str = "auto"
    commit: str | None = None
    """This repository's commit, for the card, where the run has no git to ask."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig | None = field(default_factory=EvaluationConfig)
    """null: nothing is measured after calibration."""

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, POLICIES)
        _one_of("trainable", self.trainable, TRAINABLE)
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("fraction", self.fraction, FRACTIONS)
        _one_of("source", self.source, SOURCES)
        _need(
            self.source == "linear" or self.trainable == "all" and self.granularity == "head",
            "source: neuron has no heads to train and no logit of a layer: use trainable: all and granularity: head",
        )
        _need(
            self.policy == "dms" or self.source == "neuron" and self.lag == 1,
            "policy: dmc decides by a channel of the keys, of each token about the one before: use source: neuron, "
            "trainable: all and lag: 1",
        )
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("pull", self.pull, PULLS)
        _need(self.pull != "hinge_text" or self.fraction == "hard", "pull: hinge_text counts hard: use fraction: hard")
        _one_of("hold", self.hold, HOLDS)
        _one_of("device", self.device, DEVICES)
        _need(self.window >= 1, f"window is {self.window}; it counts the current token, so use at least 1")
        _need(self.lag in (0, 1, self.window), f"lag is {self.lag}; it is 0, 1 or the window")
        _need(
            self.max_cr > 1, f"max_cr is {self.max_cr:g}; a ratio is tokens seen over tokens held, so use more than 1"
        )
        _need(
            self.length > 2 * self.window,
            f"length is {self.length} and window {self.window}: rows must be more than twice the window to learn from",
        )
        _need(bool(self.pieces), "pieces is empty; [1] is rows of one text")
        for count in self.pieces:
            _need(
                count >= 1 and self.length % count == 0 and self.length // count > 2 * self.window,
                f"pieces has {count}; it must divide the length, {self.length}, into texts of over two windows",
            )
        check_data(self.data, length=self.length)
        _need(
            self.tensor_parallel == 1 or self.trainable == "heads",
            f"tensor_parallel shares a base that is frozen: use trainable: heads, or FSDP to train {self.trainable}",
        )
        _need(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "beta1 and beta2 lie between 0 and 1")
        for name in ("hold_steps", "decay_steps"):
            _need(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; use 0 or more")
        _need(self.batch % self.accumulate == 0, f"batch is {self.batch}; accumulate {self.accumulate} must divide it")
        beyond = [ratio for ratio in self.family if not 1 < ratio <= self.final_cr]
        _need(not beyond, f"family has {beyond}; the run passes ratios above 1 up to {self.final_cr:g}")
        for name in ("tau", "lr", "base_lr", "clip"):
            value = getattr(self, name)
            _need(value is None or value > 0, f"{name} is {value or 0:g}; use more than 0")
        counts = "steps_per_cr batch accumulate save_every log_every stall_steps max_steps tensor_parallel"
        for name in counts.split():
            value = getattr(self, name)
            _need(value is None or value >= 1, f"{name} is {value}; use at least 1")

    @property
    def rate(self) -> float:
        """The learning rate of what is not eviction heads."""
        return BASE_LR.get(self.trainable, 0.0) if self.base_lr is None else self.base_lr

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.steps_to(self.max_cr) + self.hold_steps
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_to(self, ratio: float) -> int:
        """The step at which the target reaches a ratio."""
        return self.fade_steps + math.ceil((ratio - 1) * self.steps_per_cr - 1e-9)

    @property
    def fade_steps(self) -> int:
        """Steps before the schedule."""
        return self.neuron.fade_steps if self.source == "neuron" else 0

    @property
    def final_cr(self) -> float:
        """The last step's target ratio."""
        return min(1 + max(self.steps - self.fade_steps, 0) / self.steps_per_cr, self.max_cr)

    def training_keys(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes it."""
        free = {"output", "save_every", "log_every", "stall_steps", "tensorboard", "accumulate", "tensor_parallel"}
        free |= {"gradient_checkpointing", "device", "commit", "calibration", "evaluation"}
        return {key: value for key, value in asdict(self).items() if key not in free}


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> RetrofitConfig:
    """Read a YAML file and apply `key=value` overrides (dotted keys reach inside: `evaluation.items=8`).

    Raises ValueError, naming the key, for a missing file, unknown or missing keys, or a value that does not fit.
    """
    return parse_config(read_yaml(path, overrides=overrides))


def parse_config(raw: dict[str, Any]) -> RetrofitConfig:
    """The configuration in a plain dictionary. Raises ValueError as load_config does."""
    return parse(RetrofitConfig, raw)


def save_config(config: RetrofitConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that load_config reads back."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
