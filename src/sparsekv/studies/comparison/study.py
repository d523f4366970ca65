"""A comparison in one YAML file: which methods, at which ratios, on what."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsekv.evals.methods.measure import DENSE
from sparsekv.evals.methods.setting import Setting
from sparsekv.evals.settings import MeasurementConfig
from sparsekv.policies.registry import describe


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a name in the tables stands for."""

    name: str
    policy: str
    """The name, where nothing else is said."""
    adapter: str | None = None
    reads: list[float] = field(default_factory=list)
    """Shares of what the adapter's heads hold that a query reads: all are measured on running text, the first on
    everything."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second and milliseconds a step in the engine, with `output` tokens after prompts of `prompt`."""

    batches: list[int]
    prompt: int
    output: int
    ratio: float
    kv_memory: str
    """Of each engine: several are ready at once."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Raises ValueError for an unknown policy, an empty grid, or values that measure nothing."""

    model: str
    methods: list[Method]
    ratios: list[float]
    text: str = "encyclopedia"
    seed: int = 0
    batch: int = 1
    perplexity: dict[str, int] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)
    speed: Speed | None = None

    def __post_init__(self) -> None:
        if not self.methods or not self.ratios:
            raise ValueError("the study's grid is empty: name methods and ratios")
        for method in self.methods:
            for share in method.reads or [None]:
                self.setting(method, ratio=max(self.ratios), reads=share)
        assert self.config is not None

    @property
    def config(self) -> MeasurementConfig:
        """What each cell measures: everything by decode steps, at equal peaks and, for trained heads, at the ratio."""
        return MeasurementConfig(
            text=bool(self.perplexity),
            by="steps",
            batch=self.batch,
            seed=self.seed,
            same_ratio=True,
            equal_peak=True,
            **self.perplexity,
            **self.retrieval,
        )

    def setting(self, method: Method, *, ratio: float, reads: float | None = None) -> Setting:
        """A method at a ratio. Raises ValueError as Setting does."""
        about = describe(method.policy)
        if method.policy == DENSE.policy:
            raise ValueError("dense is measured anyway: leave it out of the methods")
        options = {"seed": self.seed} if "seed" in about.options else {}
        return Setting(policy=method.policy, adapter=method.adapter, cr=ratio, reads=reads, options=options)


def load_study(path: str | Path) -> Study:
    """Raises ValueError for a file that is not such a study."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("methods", {}), dict):
        raise ValueError(f"{path} holds no study: write keys such as model, methods (by name) and ratios")
    try:
        speed = raw.pop("speed", None)
        methods = [Method(**{"name": n, "policy": n} | (about or {})) for n, about in raw.pop("methods", {}).items()]
        return Study(**raw, methods=methods, speed=None if speed is None else Speed(**speed))
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).split('__init__() ')[-1]}") from None
