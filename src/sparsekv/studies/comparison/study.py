"""A comparison in one YAML file: which methods, at which ratios, on what. A cell is one method at one ratio, or one
method's speed; `dense` is measured with each process's first cell, and has a cell of its own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsekv.evals.methods.setting import Setting
from sparsekv.evals.settings import MeasurementConfig
from sparsekv.policies.registry import describe


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second and milliseconds a step in the engine, with `output` tokens after prompts of `prompt`."""

    batches: list[int]
    prompt: int
    output: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """Raises ValueError for an unknown policy, an empty grid, or values that measure nothing."""

    model: str
    policies: list[str]
    ratios: list[float]
    adapter: str | None = None
    text: str = "encyclopedia"
    seed: int = 0
    batch: int = 1
    perplexity: dict[str, int] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)
    speed: Speed | None = None

    def __post_init__(self) -> None:
        if not self.policies or not self.ratios:
            raise ValueError("the study's grid is empty: name policies and ratios")
        for name in self.policies:
            describe(name)
        assert self.config is not None

    @property
    def config(self) -> MeasurementConfig:
        """What each cell measures."""
        return MeasurementConfig(
            text=bool(self.perplexity),
            by="steps",
            batch=self.batch,
            seed=self.seed,
            **self.perplexity,
            **self.retrieval,
        )

    def setting(self, policy: str, ratio: float, *, tokens: int) -> Setting:
        """A method at a ratio. What DMS + Quest reads is a quarter of what DMS would hold of `tokens`."""
        adapter = self.adapter if describe(policy).needs_training else None
        if policy == "dms-quest":
            return Setting(policy=policy, adapter=adapter, cr=ratio, budget=max(1, -int(-tokens // (4 * ratio))))
        return Setting(policy=policy, adapter=adapter, cr=ratio)


def load_study(path: str | Path) -> Study:
    """Raises ValueError for a file that is not such a study."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no study: write keys such as model, policies and ratios")
    try:
        speed = raw.pop("speed", None)
        return Study(**raw, speed=None if speed is None else Speed(**speed))
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).split('__init__() ')[-1]}") from None
