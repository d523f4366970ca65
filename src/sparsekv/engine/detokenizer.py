"""Token ids to text, one token at a time, never half a character.

A token may be part of a character and its text may depend on those before it, so a short tail is decoded together and
only what no later token can change is let go: text that does not end in U+FFFD.
"""

from typing import Any

CONTEXT = 5
"""Tokens of the prompt that the first tokens' spacing depends on."""


class Detokenizer:
    """tokenizer: anything with decode(ids, skip_special_tokens=...); prompt: token ids before the output."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = prompt[-CONTEXT:]
        self._done = 0
        self._read = len(self._ids)
        self.text = ""
        """The text so far."""

    def push(self, token: int) -> str:
        """Append a token; returns what it adds to the text, possibly nothing yet."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """Let go of what is held back: an incomplete character becomes U+FFFD."""
        return self._advance(final=True)

    def fork(self) -> "Detokenizer":
        """An independent copy."""
        copy = Detokenizer(self._tokenizer, [], skip_special_tokens=self._skip)
        copy._ids, copy._done, copy._read, copy.text = list(self._ids), self._done, self._read, self.text
        return copy

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._done : self._read])
        now = self._decode(self._ids[self._done :])
        if not final and (len(now) <= len(before) or now.endswith("\ufffd")):
            return ""
        self._done, self._read = self._read, len(self._ids)
        added = now[len(before) :]
        self.text += added
        return added

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
