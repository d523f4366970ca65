"""How much is measured."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Perplexity and divergence on `rows` held-out texts of `length` tokens, retrieval on `items` items of each kind at
    each context length. Raises ValueError for values that measure nothing."""

    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    """Compression ratios to ask for; dense is always measured."""
    rows: int = 24
    length: int = 2048
    """Tokens per text."""
    items: int = 24
    contexts: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Lengths of the retrieval items, in tokens."""
    batch: int = 8
    """Texts of one forward."""
    seconds: float = 600.0
    """No further ratio is begun after this many seconds."""
    seed: int = 0

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not ratio >= 1:
                raise ValueError(f"ratios has {ratio:g}; a ratio is tokens seen over tokens held, so use 1 or more")
        for name, least in (("rows", 1), ("length", 2), ("items", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least {least}")
        if min(self.contexts, default=128) < 128:
            raise ValueError(f"contexts has {min(self.contexts)} tokens; facts and questions need 128 or more")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds:g}; use more than 0")
