"""How much is measured, and how."""

from dataclasses import dataclass, field

EVICTIONS = ("cache", "mask")
ANSWERS = ("forced", "generated")
WAYS = ("auto", "steps", "prefill")
TARGETS = (1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
LENGTHS = (512, 1024, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Perplexity and divergence on `rows` held-out texts of `length` tokens, and as many of each other text; retrieval
    on `items` items of each kind at each context. Raises ValueError for values that measure nothing."""

    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    """Compression ratios to ask for; dense is always measured."""
    rows: int = 24
    length: int = 2048
    """Tokens per text."""
    other_texts: list[str] = field(default_factory=list)
    """Texts of other domains, as in `data`: each measured beside the held-out part of the training's."""
    long_lengths: list[int] = field(default_factory=list)
    """Further lengths of held-out text, such as 2 and 4 times the training's, with as many tokens in all."""
    same_ratio: bool = False
    """Dial an offset for each text until the ratio measured on it is the one asked for; otherwise the adapter's offset
    serves all of them, and each has the ratio that comes of it."""
    items: int = 24
    contexts: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Lengths of the retrieval items, in tokens."""
    kinds: list[str] = field(default_factory=lambda: ["pass key", "unseen"])
    """Of retrieval: pass key, unseen, look-up, multi-needle, variable tracking, new relations, new forms, rivals, two
    hops; see retrieval.py."""
    answers: str = "forced"
    """How retrieval is read: teacher-forced in one forward, or generated token by token."""
    eviction: str = "cache"
    """The real cache, or the same rule as a mask; see forward.py."""
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
        if min(self.long_lengths, default=2) < 2:
            raise ValueError(f"long_lengths has {min(self.long_lengths)}; use at least 2 tokens")
        for name, value, known in (("eviction", self.eviction, EVICTIONS), ("answers", self.answers, ANSWERS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")
        if self.answers == "generated" and self.eviction == "mask":
            raise ValueError("generated answers come out of the real cache; use eviction: cache")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds:g}; use more than 0")


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """How methods are measured side by side; the fields that EvaluationConfig has too mean the same there. Raises
    ValueError for values that measure nothing."""

    rows: int = 2
    length: int = 2048
    long_lengths: list[int] = field(default_factory=list)
    same_ratio: bool = False
    """Of the questions too: see EvaluationConfig."""
    items: int = 4
    contexts: list[int] = field(default_factory=lambda: [1024, 2048])
    kinds: list[str] = field(default_factory=list)
    answers: str = "forced"
    text: bool = True
    """Whether running text is measured."""
    scored: int | None = None
    """Of each text the last so many tokens are scored, after all others as the prompt; None = half of it."""
    equal_peak: bool = False
    """A budget made of a ratio bounds what is held at the end: methods that have one for the prompt alone, and keep all
    that follows, leave room for it."""
    by: str = "auto"
    """How running text is scored: by decode steps; read off one prefill, which methods that prune a finished prompt or
    choose what a query reads do not allow; or auto, by steps where one of the methods needs them."""
    batch: int = 1
    seconds: float = 3600.0
    """No further setting is begun after so many."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("length", 4), ("items", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least {least}")
        if min(self.contexts, default=128) < 128:
            raise ValueError(f"contexts has {min(self.contexts)} tokens; facts and questions need 128 or more")
        if min(self.long_lengths, default=4) < 4:
            raise ValueError(f"long-lengths has {min(self.long_lengths)}; use at least 4 tokens")
        shortest = min([self.length, *self.long_lengths])
        if self.scored is not None and not 1 <= self.scored <= shortest - 2:
            raise ValueError(f"scored is {self.scored}; of texts of {shortest} tokens use 1 to {shortest - 2}")
        for name, value, known in (("by", self.by, WAYS), ("answers", self.answers, ANSWERS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds:g}; use more than 0")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which ratios the offset table gets, measured on how much held-out text. A row never leaves its document: lengths
    that no document or the model's context has are left out, and the longest left stands for `length`."""

    targets: list[float] = field(default_factory=lambda: list(TARGETS))
    """Compression ratios, window counted, at `length` tokens; those that the heads cannot reach are left out."""
    rows: int = 16
    """Of `length` tokens; of each further length as many, and fewer of the longer ones, which hold as much text."""
    length: int = 2048
    """Tokens per row."""
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    """Further lengths, at which the ratios of the same offsets are measured."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("calibration.targets is empty; name ratios such as 2, 4, 8")
        low = min(self.targets)
        if low <= 1:
            raise ValueError(
                f"calibration.targets has {low:g}; a ratio is tokens seen over tokens held, so use more than 1"
            )
        if self.rows < 1:
            raise ValueError(f"calibration.rows is {self.rows}; use at least 1")
        if self.length < 2:
            raise ValueError(f"calibration.length is {self.length}; use at least 2 tokens")
        if min(self.lengths, default=2) < 2:
            raise ValueError(f"calibration.lengths has {min(self.lengths)}; use at least 2 tokens")
