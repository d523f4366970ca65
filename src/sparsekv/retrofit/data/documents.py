"""A source's documents: plain text or chats, for training and held out, read from files, a dataset or the model itself.

What is held out measures and calibrates the result and is never trained on: the last tenth, or the first documents of
a dataset that streams.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.assets.texts import chat_names, fetch_chats, split
from sparsekv.evals.corpus import load_documents
from sparsekv.retrofit.data.config import Source
from sparsekv.retrofit.data.own_text import own_text

HELD_OUT = 64
"""Documents at the head of a dataset; as many after them are the hay of retrieval."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """What a source holds."""

    source: Source
    training: list[str]
    """In memory: all that is trained on, or a sample of what streams."""
    held_out: list[str]
    chats: bool = False
    """Whether a document must stay whole."""
    stream: Callable[[], Iterator[str]] | None = None
    """What is trained on where it does not fit into memory, from its beginning, the same at each call."""


def read_documents(source: Source, tokenizer: PreTrainedTokenizerBase, *, model: str, seed: int) -> Documents:
    """model: its name, for a source that it writes itself.

    Raises ValueError for files or datasets that cannot be read, a column that is missing, chats without a template.
    """
    if source.kind in ("text", "retrieval"):
        training, held_out = load_documents(source.names)
        return Documents(source=source, training=training, held_out=held_out)
    if source.kind == "huggingface":
        return _dataset(source, tokenizer)
    if source.kind == "self":
        training, held_out = _halves(own_text(model, source, seed=seed))
        return Documents(source=source, training=training, held_out=held_out)
    chats = [chat for name in source.names for chat in _chats(name, source.column or "messages", tokenizer)]
    training, held_out = _halves(chats)
    return Documents(source=source, training=training, held_out=held_out, chats=True)


def read_all(data: Sequence[Source], tokenizer: PreTrainedTokenizerBase, *, model: str, seed: int) -> list[Documents]:
    """read_documents for each source of a blend."""
    return [read_documents(source, tokenizer, model=model, seed=seed) for source in data]


def held_out(documents: Sequence[Documents]) -> list[str]:
    """What measures a run: the held-out documents of its data, where there are none of what the model wrote itself, and
    last of retrieval's texts."""
    own = [found for found in documents if found.source.kind == "self"]
    others = [found for found in documents if found.source.kind not in ("self", "retrieval")]
    return [text for found in others or own or documents for text in found.held_out if text]


def _halves(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out); of one document nothing is held out."""
    return split(documents) if len(documents) > 1 else (documents, [])


def _chats(name: str, column: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if name in chat_names() and not Path(name).exists():
        for number, chat in enumerate(fetch_chats(name)):
            yield render(chat, tokenizer, where=f"chat {number} of {name}")
        return
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {name} as JSON lines: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)[column]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of {name} holds no {column!r}: each line is an object with a chat"
            ) from None
        yield render(messages, tokenizer, where=f"line {number} of {name}")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{name} holds no chat; each line is an object with {column!r}")


def render(messages: Any, tokenizer: PreTrainedTokenizerBase, *, where: str) -> str:
    """A chat as text through the tokenizer's template. Raises ValueError without one, or for what is no chat."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, so chats cannot be read; use texts, or another model")
    whole = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not whole:
        raise ValueError(f"{where} is no chat: it is a list of messages with role and content")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def _dataset(source: Source, tokenizer: PreTrainedTokenizerBase) -> Documents:
    column = source.column or "text"

    def rows() -> Iterator[str]:
        for number, row in enumerate(_load(source)):
            yield from _texts(row, source, column, tokenizer, f"row {number} of {source.dataset}")

    head = list(itertools.islice(rows(), 2 * HELD_OUT))
    if len(head) <= HELD_OUT:
        raise ValueError(
            f"{source.dataset} gives {len(head)} documents and the first {HELD_OUT} are held out; use more"
        )
    return Documents(
        source=source,
        training=head[HELD_OUT:],
        held_out=head[:HELD_OUT],
        chats=source.prompt is not None or column == "messages",
        stream=lambda: itertools.islice(rows(), HELD_OUT, None),
    )


def _load(source: Source) -> Any:
    import datasets

    assert source.dataset is not None
    try:
        loaded: Any = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, streaming=source.streaming
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load the dataset {source.dataset}: {reason}") from None
    names = loaded.column_names or list(next(iter(loaded), {}))
    for column in (source.column or "text", source.prompt, source.where):
        if column is not None and column not in names:
            raise ValueError(f"{source.dataset} has no column {column!r}; it has {', '.join(names)}")
    return loaded


def _texts(
    row: dict[str, Any], source: Source, column: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[str]:
    """The documents of one row: none where `where` says no."""
    value: Any = row[column]
    keep = True if source.where is None else row[source.where]
    is_chat = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    parts: list[Any] = value if isinstance(value, list) and not is_chat else [value]
    flags = keep if isinstance(keep, list) and len(keep) == len(parts) else [bool(keep)] * len(parts)
    for part, kept in zip(parts, flags, strict=True):
        if not kept:
            continue
        if source.prompt is not None:
            yield _answered(row[source.prompt], part, tokenizer)
        else:
            yield render(part, tokenizer, where=where) if is_chat else part


def _answered(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Question and answer as the model would have written it: templates of reasoning models drop the thoughts of an
    assistant's message, so the answer goes after the prompt of a generation."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, so chats cannot be read; use texts, or another model")
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    if prompt.rstrip().endswith("<think>"):
        answer = answer.removeprefix("<think>").lstrip("\n")
    return prompt + answer + str(tokenizer.eos_token or "")
