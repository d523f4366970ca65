"""The rows a retrofit trains on: a blend of sources. Which source row i comes from is decided by the weights alone,
what the row holds by (seed, i), or, for a source that streams, by its place among that source's rows.

So a resumed run sees exactly the rows that an undisturbed one would have seen; a stream is read again up to there.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sparsekv.evals.corpus import Corpus, hay_of
from sparsekv.evals.items import ItemBuilder
from sparsekv.retrofit.data.documents import Documents
from sparsekv.retrofit.data.packing import Row, fill, pack
from sparsekv.retrofit.data.retrieval_rows import training_item


class Rows(Protocol):
    """One source's rows of a fixed length."""

    packed: bool
    """Whether a row may hold several documents."""

    def row(self, rng: np.random.Generator, number: int) -> Row:
        """rng: decided by the row; number: its place among this source's rows, which only ever rises."""
        ...


class Blend(Dataset[dict[str, Tensor]]):
    """`count` rows. A row is {"input_ids": int64 [length]} and, where a source packs documents into rows, "documents":
    int64 [length]. weights: of the sources; any stretch of rows holds each in proportion, to within one row."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], *, count: int, seed: int) -> None:
        self.sources, self.count, self.seed = sources, count, seed
        self.packed = any(source.packed for source in sources)
        self.source_of, self.place_of = _schedule(weights, count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        ids, documents = self.sources[self.source_of[index]].row(rng, int(self.place_of[index]))
        row = {"input_ids": torch.from_numpy(ids.astype(np.int64))}
        if self.packed:
            row["documents"] = torch.from_numpy(documents.astype(np.int64))
        return row


def blend(
    documents: Sequence[Documents],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    pieces: Sequence[int] = (1,),
) -> Blend:
    """The blend of sources that were read (documents.read_documents), as rows of `length` tokens. pieces: into how many
    texts of equal length a source's rows are cut, in turn; those that pack documents are left whole.

    Raises ValueError for empty texts, and a chat that is longer than a row and may not be cut.
    """
    hay = [text for found in documents if found.source.kind != "retrieval" for text in found.training]
    rows = [_rows(found, tokenizer, hay, length, pieces) for found in documents]
    return Blend(rows, [found.source.weight for found in documents], count=count, seed=seed)


def _schedule(weights: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(source of each row, its place among that source's rows): the source that lags most behind its share is next."""
    share = np.asarray(weights, dtype=float) / sum(weights)
    used = np.zeros(len(share), dtype=int)
    source, place = np.empty(count, dtype=int), np.empty(count, dtype=int)
    for index in range(count):
        chosen = int(np.argmax((index + 1) * share - used))
        source[index], place[index] = chosen, used[chosen]
        used[chosen] += 1
    return source, place


def _rows(
    found: Documents, tokenizer: PreTrainedTokenizerBase, hay: list[str], length: int, pieces: Sequence[int]
) -> Rows:
    if found.source.kind == "retrieval":

        def facts(length: int) -> Rows:
            builder = ItemBuilder(hay_of(found.training or hay, tokenizer, length), tokenizer)
            return _Retrieval(builder, length, grammar=found.source.grammar)

        return _in_pieces(facts, length, pieces)
    if found.stream is not None or found.chats or found.source.kind == "self":  # which ends texts where it likes
        return _Packed(found, tokenizer, length)
    corpus = Corpus(found.training, tokenizer)
    if corpus.longest < length:
        return _Packed(found, tokenizer, length)
    return _in_pieces(lambda length: _Stretches(corpus, length), length, pieces)


def _in_pieces(make: Callable[[int], Rows], length: int, pieces: Sequence[int]) -> Rows:
    return make(length) if set(pieces) == {1} else _Pieces([make(length // n) for n in pieces], pieces)


class _Pieces:
    """Rows of several texts end to end: row i of pieces[i % len(pieces)] rows of the source of that place."""

    packed = True

    def __init__(self, sources: Sequence[Rows], pieces: Sequence[int]) -> None:
        self.sources, self.pieces = sources, pieces

    def row(self, rng: np.random.Generator, number: int) -> Row:
        place = number % len(self.pieces)
        texts = [self.sources[place].row(rng, number)[0] for _ in range(self.pieces[place])]
        return np.concatenate(texts), np.repeat(np.arange(len(texts)), [len(text) for text in texts])


class _Stretches:
    """Random stretches of long documents."""

    packed = False

    def __init__(self, corpus: Corpus, length: int) -> None:
        self.corpus, self.length = corpus, length

    def row(self, rng: np.random.Generator, number: int) -> Row:
        return self.corpus.window(rng, self.length).ids, np.zeros(self.length, dtype=int)


class _Retrieval:
    """Facts and questions; see retrieval.py."""

    packed = False

    def __init__(self, builder: ItemBuilder, length: int, *, grammar: float) -> None:
        builder.corpus.window(np.random.default_rng(0), length)  # refuses text that is too short before any step
        self.builder, self.length, self.grammar = builder, length, grammar

    def row(self, rng: np.random.Generator, number: int) -> Row:
        return training_item(self.builder, rng, self.length, grammar=self.grammar).ids, np.zeros(self.length, dtype=int)


class _Packed:
    """Documents packed into rows: those in memory in an order that the row decides, a stream in its own."""

    packed = True

    def __init__(self, found: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.found, self.tokenizer, self.length = found, tokenizer, length
        self.memory = [] if found.stream is not None else list(self._tokenised(iter(found.training)))
        if found.stream is None and not self.memory:
            raise ValueError(f"a {found.source.kind} source holds nothing to train on; name other files")
        self.stream: Iterator[Row] | None = None
        self.next = 0
        """The place of the stream's next row."""

    def row(self, rng: np.random.Generator, number: int) -> Row:
        if self.found.stream is None:
            return fill(lambda: self.memory[int(rng.integers(len(self.memory)))], self.length)
        if self.stream is None or number < self.next:
            self.stream, self.next = self._endless(), 0
        while True:
            row = next(self.stream)
            self.next += 1
            if self.next > number:
                return row

    def _endless(self) -> Iterator[Row]:
        """The stream's rows, from its beginning again where it ends."""
        assert self.found.stream is not None
        while True:
            empty = True
            for row in pack(self._tokenised(self.found.stream()), self.length, whole=self.found.chats):
                empty = False
                yield row
            if empty:
                name = self.found.source.dataset
                raise ValueError(f"{name} does not fill a row of {self.length} tokens; use more text or shorter rows")

    def _tokenised(self, texts: Iterator[str]) -> Iterator[np.ndarray]:
        long = self.found.source.long if self.found.chats else "cut"
        for place, text in enumerate(texts):
            ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            if len(ids) > self.length and long == "refuse":
                raise ValueError(
                    f"chat {place} of {self.found.source.dataset or ', '.join(self.found.source.names)} has {len(ids)} "
                    f"tokens and rows have {self.length}; use longer rows, or long: cut or long: drop for this source"
                )
            if len(ids) and (len(ids) <= self.length or long != "drop"):
                yield ids[: self.length] if self.found.chats else ids
