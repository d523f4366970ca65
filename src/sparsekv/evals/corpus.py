"""Documents as tokens that remember where sentences begin: rows of text, and the hay for needles.

A row never leaves its document, so nothing needs to be kept apart inside it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv.assets.texts import fetch_text, split, text_names

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=\S)(?=\n)")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of one document."""

    ids: np.ndarray
    """int32 [length]."""
    cuts: np.ndarray
    """int64, ascending: positions 0 .. length - 1 at which a sentence begins."""


class Corpus:
    """Documents of plain text, each tokenised once however many corpora hold it.

    Raises ValueError for an empty corpus, and in `window` and `rows` where no document is long enough.
    """

    def __init__(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.documents = [_tokenise(text, _Reader(tokenizer)) for text in documents if text.strip()]
        if not self.documents:
            raise ValueError("the text is empty; name a file with plain text in it")

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(len(document.ids) for document in self.documents)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(len(document.ids) for document in self.documents)

    def window(self, rng: np.random.Generator, length: int) -> Window:
        """A random stretch of exactly `length` tokens; every stretch of the corpus is equally likely."""
        starts = np.array([max(len(document.ids) - length + 1, 0) for document in self.documents])
        if not starts.any():
            raise self._too_short(length)
        at = int(rng.integers(starts.sum()))
        document = int(np.searchsorted(starts.cumsum(), at, side="right"))
        first = at - int(starts[:document].sum())
        whole = self.documents[document]
        low, high = np.searchsorted(whole.cuts, (first, first + length))
        return Window(ids=whole.ids[first : first + length], cuts=whole.cuts[low:high] - first)

    def rows(self, count: int, length: int) -> Tensor:
        """int64 [at most count, length]: stretches that do not overlap, spread over the documents in turn."""
        pieces = [document.ids[: len(document.ids) // length * length] for document in self.documents]
        split_pieces = [piece.reshape(-1, length) for piece in pieces if len(piece)]
        if not split_pieces:
            raise self._too_short(length)
        deepest = max(len(piece) for piece in split_pieces)
        turns = [piece[i] for i in range(deepest) for piece in split_pieces if i < len(piece)]
        return torch.from_numpy(np.stack(turns[:count]).astype(np.int64))

    def fitting(self, count: int, length: int) -> int:
        """`length`, or where no document has so many, the most tokens that `count` documents (or all) have."""
        if self.longest >= length:
            return length
        return sorted((len(document.ids) for document in self.documents), reverse=True)[:count][-1]

    def _too_short(self, length: int) -> ValueError:
        text = f"rows of {length} tokens are asked for and the longest document has {self.longest}; ask for less"
        return ValueError(text)


def hay_of(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Corpus:
    """What retrieval strews its facts into: documents, joined where none has `length` tokens."""
    corpus = Corpus(documents, tokenizer)
    return corpus if corpus.longest >= length else Corpus(["\n\n".join(documents)], tokenizer)


def load_documents(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, held out) documents of texts by name: one that fetch_text knows, a text file, or a folder of *.txt
    files.

    The last tenth of each text is held out: whole documents, or the last lines of the only one, or where it is one line
    its last words. Raises ValueError for a text that cannot be read.
    """
    training: list[str] = []
    held_out: list[str] = []
    for name in names:
        documents = _documents(name)
        if len(documents) == 1:
            end = int(0.9 * len(documents[0]))
            cut = documents[0].rfind("\n", 0, end) + 1 or documents[0].rfind(" ", 0, end) + 1
            parts = [documents[0][:cut]], [documents[0][cut:]]
        else:
            parts = split(documents)
        training += parts[0]
        held_out += parts[1]
    return training, held_out


def other_documents(names: Sequence[str], *, trained_on: Sequence[str]) -> dict[str, list[str]]:
    """Texts of other domains by name: all of each, or the held-out part of one that was trained on.

    Raises ValueError for a text that cannot be read.
    """
    found = {}
    for name in names:
        training, held_out = load_documents([name])
        found[name] = held_out if name in trained_on else training + held_out
    return found


def _documents(name: str) -> list[str]:
    path = Path(name)
    if not path.exists():
        if "/" in name or "." in name:
            known = ", ".join(text_names())
            raise ValueError(f"there is no text {name}: give {known}, a text file, or a folder of .txt files")
        return fetch_text(name)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"the folder {name} holds no .txt file")
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {name} as UTF-8 text: {error}") from None


class _Reader:
    """A tokenizer as a key: one that was loaded again from the same place reads the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or str(id(tokenizer))

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reader) and other.name == self.name


@lru_cache(maxsize=4096)
def _tokenise(text: str, reader: _Reader) -> Window:
    pieces = [piece for piece in _SENTENCE_END.split(text) if piece]
    ids = reader.tokenizer(pieces, add_special_tokens=False)["input_ids"]
    lengths = np.array([len(piece) for piece in ids])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    return Window(ids=np.concatenate([np.asarray(piece, dtype=np.int32) for piece in ids]), cuts=starts[lengths > 0])
