"""Token ids to text, when somebody asks for it, never half a character.

What is new is decoded together with a few tokens before it, on which its spaces may depend. A trailing U+FFFD may be
the first bytes of a character whose last are still to come: a character has four bytes at most, so up to three of them
are held back. One token or thousands may be new; each is decoded about twice, whenever the text is read.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

Decode = Callable[[list[int]], str]

CONTEXT = 8
"""Tokens that the text of the next ones may depend on."""
HELD = 3
"""Trailing U+FFFD that the next token may still change."""


def decoder(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    """tokenizer.decode, without what Transformers does around it where that changes nothing: it takes most of the time.

    tokenizer: anything with decode(ids, skip_special_tokens=...).
    """
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.clean_up_tokenization_spaces
    if plain and all(getattr(type(tokenizer), n) is getattr(PreTrainedTokenizerFast, n) for n in ("decode", "_decode")):
        decode: Any = tokenizer.backend_tokenizer.decode
    else:
        decode = tokenizer.decode
    return lambda ids: decode(ids, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """decode: see `decoder`; tokens: prompt and output, a list that grows; prompt: how many of them are no output."""

    def __init__(self, decode: Decode, tokens: list[int], *, prompt: int) -> None:
        self._decode = decode
        self._tokens = tokens
        self._first = max(0, prompt - CONTEXT)
        self._prompt: int | None = prompt
        self._given = 0
        self._pieces: list[str] = []
        self.length = 0
        """Characters of the text so far."""

    @property
    def text(self) -> str:
        """The text so far: what `advance` has let go."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def tail(self, count: int) -> str:
        """The last `count` characters of the text, or all."""
        found, length = [], 0
        for piece in reversed(self._pieces):
            if length >= count:
                break
            found.append(piece)
            length += len(piece)
        return "".join(reversed(found))[-count:] if count > 0 else ""

    def advance(self, *, end: int | None = None, final: bool = False) -> str:
        """Take in the tokens up to `end` (None = all); returns what they add to the text, possibly nothing yet.

        final: nothing follows, an incomplete character becomes U+FFFD.
        """
        end = len(self._tokens) if end is None else end
        if self._prompt is not None:
            self._given, self._prompt = len(self._decode(self._tokens[self._first : self._prompt])), None
        now = self._decode(self._tokens[self._first : end])
        held = 0 if final else min(HELD, len(now) - len(now.rstrip("\ufffd")))
        added = now[self._given : len(now) - held]
        if added:
            self._given += len(added)
            self._pieces.append(added)
            self.length += len(added)
        if end - self._first > 2 * CONTEXT:
            waiting = len(now) - self._given
            self._first = end - CONTEXT
            self._given = max(0, len(self._decode(self._tokens[self._first : end])) - waiting)
        return added
