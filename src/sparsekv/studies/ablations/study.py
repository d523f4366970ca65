"""A study in one YAML file: `base`, a retrofit's configuration; `runs`, by name what each changes in it; `pictures`,
which runs are shown together. Controls (controls.py) and checkpoints of its family take the heads of the run `base`.

    base: {model: smollm2-135m, steps_per_cr: 25, ...}
    runs:
      base: {family: [4]}
      window 16: {window: 16}
      shuffled heads: {control: shuffled}
      on the way at 4: {checkpoint: 4}
    pictures:
      window: {title: The window, runs: [window 16, base]}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv import yaml_file
from sparsekv.retrofit.config import RetrofitConfig, parse_config
from sparsekv.studies.ablations.controls import CONTROLS

BASE = "base"
"""The run that the others are compared with, and whose heads the controls take."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One retrofit, or the base's heads at an earlier step or with something done to them."""

    name: str
    config: RetrofitConfig
    """The base's where nothing is trained."""
    changes: dict[str, Any]
    control: str | None = None
    checkpoint: float | None = None

    @property
    def trained(self) -> bool:
        """Whether it trains heads of its own."""
        return self.control is None and self.checkpoint is None

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return (self.name if self.trained else BASE).replace(" ", "-").replace(",", "")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Runs shown together."""

    name: str
    title: str
    runs: list[str]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All of it."""

    runs: dict[str, Run]
    pictures: list[Picture]


def load_study(path: str | Path, *, overrides: Sequence[str] = ()) -> Study:
    """Read a study; overrides: `key=value` over its base.

    Raises ValueError for a file that is not such a study, an unknown control or run, or a configuration that does not
    fit, naming the run.
    """
    raw = yaml_file.read(path)
    if not isinstance(raw, dict) or set(raw) != {"base", "runs", "pictures"} or BASE not in raw["runs"]:
        raise ValueError(f"{path} must hold the keys base, runs and pictures, and a run named {BASE}")
    base = raw["base"]
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override} has no '='; write --set key=value")
        base = merged(base, _nested(key, yaml_file.load(value)))
    changed = {name: changes or {} for name, changes in raw["runs"].items()}
    own = merged(base, changed[BASE])
    runs = {name: _run(name, own if _takes_base(changes) else base, changes) for name, changes in changed.items()}
    pictures = [Picture(name=name, **picture) for name, picture in raw["pictures"].items()]
    unknown = sorted({run for picture in pictures for run in picture.runs} - set(runs))
    if unknown:
        raise ValueError(f"the pictures of {path} show unknown runs: {', '.join(unknown)}")
    return Study(runs=runs, pictures=pictures)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, sections key by key."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.strip().split(".")):
        value = {key: value}
    return value


def _takes_base(changes: dict[str, Any]) -> bool:
    """Whether a run trains nothing and takes the base's heads."""
    return not {"control", "checkpoint"}.isdisjoint(changes)


def _run(name: str, base: dict[str, Any], changes: dict[str, Any]) -> Run:
    control, ratio = changes.get("control"), changes.get("checkpoint")
    if control is not None and (control not in CONTROLS or len(changes) > 1):
        raise ValueError(f"run {name}: a control is one of {', '.join(CONTROLS)} and changes nothing else")
    if ratio is not None and (ratio not in base.get("family", []) or len(changes) > 1):
        raise ValueError(f"run {name}: a checkpoint is a ratio of the base's family and changes nothing else")
    try:
        config = parse_config(merged(base, {} if _takes_base(changes) else changes) | {"output": name})
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from None
    if config.evaluation is None:
        raise ValueError(f"run {name}: evaluation is null and an ablation measures; leave it out or fill it in")
    return Run(name=name, config=config, changes=changes, control=control, checkpoint=ratio)
