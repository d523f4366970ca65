"""What the reasoning model is made of, in one YAML file: problems with their difficulties, and the training.

model: smollm2-135m
families:
  - {family: times, levels: [2, 4, 6, 8], share: 1}
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekv.evals.problems.tasks import procedural
from sparsekv.retrofit.parse import parse, read_yaml


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """A family's part of the training data. Raises ValueError for an unknown family or difficulty."""

    family: str
    levels: list[int]
    """Difficulties; as many chains of each."""
    share: float
    """Of the training tokens, over the sum of shares."""

    def __post_init__(self) -> None:
        if not self.levels or not self.share > 0:
            raise ValueError(f"family {self.family} needs levels and a share of more than 0")
        for level in self.levels:
            procedural(self.family, level)


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """Raises ValueError for values that train nothing."""

    model: str
    families: list[FamilyConfig]
    tokens: float = 4.0e7
    """Of the training data, prompts included."""
    chats: int = 8000
    """Chains, of those, that are also written as chats, for the retrofit."""
    length: int = 4096
    """Tokens of a row; longer chains are left out."""
    batch: int = 8
    """Rows of a step."""
    steps: int = 1150
    lr: float = 1e-3
    """Rises over `warmup` steps, then falls as a cosine to a fiftieth."""
    warmup: int = 40
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("families is empty; name problems to train on, such as {family: times, ...}")
        names = [found.family for found in self.families]
        if len(set(names)) < len(names):
            raise ValueError(f"families are {', '.join(names)}; name each once")
        for name in ("tokens", "chats", "length", "batch", "steps", "lr", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; use more than 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def load(path: str | Path, *, overrides: list[str]) -> ReasoningConfig:
    """From a YAML file with `key=value` overrides. Raises ValueError for what is no such file."""
    return parse(ReasoningConfig, read_yaml(path, overrides=overrides))
