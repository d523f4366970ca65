"""A retrieval item: facts strewn over a text at random depth, then questions whose answers are those facts.

    hay ... fact ... hay ... fact ... hay   question  answer   [question  answer]

Styles: "lead" (the question is the beginning of a sentence), "ask" (the question, then that sentence), "chat" (a
conversation in the tokenizer's chat template).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparsekv.evals.corpus import Corpus

_SLOT = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One needle."""

    statement: str
    """A sentence that goes into the text."""
    question: str
    """A question in full."""
    lead: str
    """The beginning of the answer, which the answer completes: "The pass key is"."""
    answer: str
    more: tuple[str, ...] = ()
    """Further answers to the question, in a list after it."""
    begun: bool = False
    """Whether the answer's first token is given, and only what follows it is asked for: a model that knows the answer
    may begin with an article or a quotation mark. Not for answers of one token, nor for words that it could complete
    without the text."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row of tokens with the answers marked in it."""

    ids: np.ndarray
    """int32 [length]; the last answer ends at or near the end."""
    answers: list[tuple[int, int]]
    """[first, last + 1) of each answer's tokens."""
    depth: float
    """Where the first of the facts asked for is told: 0 at the beginning of the text, 1 at its end."""


class ItemBuilder:
    """Builds items of an exact length from the text of a corpus."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.styles = ("lead", "ask", "chat") if tokenizer.chat_template else ("lead", "ask")

    def build(
        self,
        rng: np.random.Generator,
        facts: Sequence[Fact],
        *,
        asked: Sequence[int],
        length: int,
        style: str,
        ordered: bool = False,
        within: float = 1.0,
    ) -> Item:
        """facts: all are told, in the first `within` of the text; those at indices `asked` are asked about, in that
        order. ordered: told in order.

        Raises ValueError where the facts and questions do not fit into `length` tokens.
        """
        head, tail, spans = self._frame([facts[i] for i in asked], style)
        told = [self._ids(" " + fact.statement) for fact in facts]
        room = length - len(head) - len(tail) - sum(len(ids) for ids in told)
        if room < 1:
            raise ValueError(f"{len(facts)} facts and {len(asked)} questions do not fit into {length} tokens")
        hay = self.corpus.window(rng, room)
        cuts = hay.cuts if len(hay.cuts) else np.array([0])
        places = rng.choice(cuts[cuts <= max(within * room, cuts[0])], size=len(facts))
        order = np.argsort(places, kind="stable")
        turn = list(range(len(told))) if ordered else rng.permutation(len(told)).tolist()
        places = places[order]
        body = _strew(hay.ids, places, [told[i] for i in turn])
        start = len(head) + len(body)
        ids = np.concatenate([np.asarray(x, dtype=np.int32) for x in (head, body, tail)])
        depth = float(places[turn.index(asked[0])]) / room
        return Item(ids=ids, answers=[(start + a, start + b) for a, b in spans], depth=depth)

    def _frame(self, facts: list[Fact], style: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """(tokens before the text, tokens after it, where the answers lie in the latter)."""
        if style == "chat":
            before, after = self._conversation(facts)
        else:
            asked = [f"{fact.question} " * (style == "ask") + f"[[{i}]]." for i, fact in enumerate(facts)]
            before, after = "", "\n\n" + "\n".join(asked)
        tail: list[int] = []
        spans: list[tuple[int, int]] = []
        for i, piece in enumerate(_SLOT.split(after)):  # text, slot, text, slot, ..., text
            if i % 2 == 0:
                tail += self._ids(piece)
                continue
            fact = facts[int(piece)]
            tail += self._ids(fact.lead)
            for j, text in enumerate((fact.answer, *fact.more)):
                tail += self._ids("," if j else "")
                answer = self._ids(" " + text)
                given = int(fact.begun and len(answer) > 1)
                spans.append((len(tail) + given, len(tail) + len(answer)))
                tail += answer
        return self._ids(before), tail, spans

    def _conversation(self, facts: list[Fact]) -> tuple[str, str]:
        messages = []
        for i, fact in enumerate(facts):
            messages.append({"role": "user", "content": "[[TEXT]]\n\n" * (i == 0) + fact.question})
            messages.append({"role": "assistant", "content": f"[[{i}]]."})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        before, after = text.split("[[TEXT]]")
        return before, after

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _strew(hay: np.ndarray, places: np.ndarray, needles: Sequence[Sequence[int]]) -> np.ndarray:
    """hay with needle i inserted before position places[i] (ascending)."""
    parts: list[np.ndarray] = []
    last = 0
    for place, needle in zip(places.tolist(), needles, strict=True):
        parts += [hay[last:place], np.asarray(needle, dtype=np.int32)]
        last = place
    return np.concatenate([*parts, hay[last:]])
