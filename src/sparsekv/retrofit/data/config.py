"""`data:` in a retrofit's configuration: a blend of sources, each with a weight.

data:
  - {kind: text, names: [encyclopedia]}
  - {kind: retrieval}
  - {kind: jsonl, names: [chats.jsonl], weight: 0.5}
"""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

KINDS = ("text", "jsonl", "huggingface", "self", "retrieval")
LONG = ("cut", "drop", "refuse")
_OWN = {
    "text": {"names"},
    "jsonl": {"names", "column", "long"},
    "huggingface": {"dataset", "subset", "split", "column", "prompt", "where", "streaming", "long"},
    "self": {"documents", "tokens", "temperature", "prompts"},
    "retrieval": {"names", "grammar"},
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a part of the rows comes from. Raises ValueError for settings that do not fit its kind.

    text         stretches of documents, or documents packed into rows where all are shorter than a row
    jsonl        chats, one a line, through the tokenizer's template and packed
    huggingface  a dataset's column: texts, chats, or answers to the column `prompt`; streamed and packed
    self         what the model itself writes
    retrieval    long-range retrieval (retrieval.py) in the text of `names`, else of the other sources
    """

    kind: str
    weight: float = 1.0
    """Its share of the rows is weight / sum of weights."""
    names: list[str] = field(default_factory=list)
    """Texts by name, files or folders."""
    dataset: str | None = None
    """A hub id or a folder, for datasets.load_dataset."""
    subset: str | None = None
    split: str = "train"
    streaming: bool = True
    column: str | None = None
    """Of a dataset (default "text") or of each line (default "messages"): a text, a chat, or a list of texts."""
    prompt: str | None = None
    """The column of the questions that `column` answers: rows are then chats of one question and one answer."""
    where: str | None = None
    """The column that says which rows to keep; where it and `column` are lists, which of the texts."""
    long: str = "refuse"
    """A chat longer than a row: cut after a row, drop, or refuse. Texts are cut."""
    grammar: float = 0.0
    """The share of retrieval's items that the grammar makes (evals/grammar/); the others are of templates."""
    documents: int = 256
    tokens: int = 2048
    """Of each document that the model writes."""
    temperature: float = 1.0
    prompts: list[str] = field(default_factory=list)
    """What it goes on from; without any, from random tokens."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"data has a source of kind {self.kind!r}; use one of {', '.join(KINDS)}")
        if not self.weight > 0:
            raise ValueError(f"the weight of a {self.kind} source is {self.weight:g}; use more than 0, or leave it out")
        own = _OWN[self.kind] | {"kind", "weight"}
        foreign = [f.name for f in fields(self) if f.name not in own and getattr(self, f.name) != _default(f)]
        if foreign:
            raise ValueError(f"a {self.kind} source has no {foreign[0]}; it takes {', '.join(sorted(_OWN[self.kind]))}")
        if self.kind in ("text", "jsonl") and not self.names:
            raise ValueError(f"a {self.kind} source needs names: files to read, or encyclopedia")
        if self.kind == "huggingface" and self.dataset is None:
            raise ValueError("a huggingface source needs a dataset: a hub id or a folder")
        if not 0 <= self.grammar <= 1:
            raise ValueError(f"grammar is {self.grammar:g}; it is a share of the items, from 0 to 1")
        if self.long not in LONG:
            raise ValueError(f"long is {self.long!r}; use one of {', '.join(LONG)}")
        if min(self.documents, self.tokens) < 1 or not self.temperature > 0:
            raise ValueError("documents, tokens and temperature of a self source are more than 0")


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def check_data(data: Sequence[Source], *, length: int) -> None:
    """Raises ValueError for a blend that is empty, has nothing to strew retrieval into, or too short rows."""
    if not data:
        raise ValueError("data is empty; name a source to train on, such as {kind: text, names: [encyclopedia]}")
    retrieval = [source for source in data if source.kind == "retrieval"]
    if retrieval and length < 256:
        raise ValueError(f"length is {length}; retrieval needs rows of 256 tokens or more, or no retrieval source")
    if len(retrieval) == len(data) and not all(source.names for source in retrieval):
        raise ValueError("retrieval needs text around its facts: give it names, or add a text source")


def describe_data(data: Sequence[Source]) -> str:
    """In words, for cards and logs: "50% encyclopedia, 50% retrieval"."""
    total = sum(source.weight for source in data)
    return ", ".join(f"{source.weight / total:.0%} {_words(source)}" for source in data)


def texts_of(data: Sequence[Source]) -> list[str]:
    """Names of the texts that are trained on."""
    return [name for source in data if source.kind in ("text", "retrieval") for name in source.names]


def _words(source: Source) -> str:
    if source.kind == "retrieval":
        return "long-range retrieval" + f" ({source.grammar:.0%} by grammar)" * (source.grammar > 0)
    if source.kind == "self":
        return "the model's own text"
    return str(source.dataset) if source.kind == "huggingface" else " + ".join(source.names)
