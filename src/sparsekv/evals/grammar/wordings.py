"""How a relation is told in a sentence and asked for: openings x statements x closings, questions x leads.

Of each list every third is the evaluation's. {n} relation, {e} entity, {v} value; a statement's first word is written
small and raised where nothing stands before it.
"""

from dataclasses import dataclass

import numpy as np

_STATEMENTS = (
    "the {n} of {e} is {v}.",
    "as everyone agrees, the {n} of {e} is {v}.",
    "as for {e}, the {n} is {v}.",
    "it is {v} that is the {n} of {e}.",
    "the register gives {v} as the {n} of {e}.",
    "when people speak of {e}, they mention {v}, which is the {n}.",
    "under {n}, the file on {e} says {v}.",
    "nobody doubts that the {n} of {e} is {v}.",
    "asked about the {n} of {e}, the clerk wrote down {v}.",
    "we checked it twice: the {n} of {e} is {v}.",
    "for {e} the {n} is given as {v}.",
    "it took a while to find out that {v} is the {n} of {e}.",
    "the {n} belonging to {e} was, is and remains {v}.",
    "of {e} one thing is certain, the {n}: {v}.",
    "those who wonder about the {n} of {e} should know that it is {v}.",
    "in the case of {e}, {v} was entered as the {n}.",
    "the {n} of {e}? That is {v}.",
    "let it be known that {e} has {v} for its {n}.",
)
_OPENINGS = (
    *(
        "",
        "",
        "by the way, ",
        "for the record, ",
        "incidentally, ",
        "to be exact, ",
        "as noted earlier, ",
        "once more: ",
    ),
    *("in short, ", "on another matter, ", "according to the minutes, ", "a remark in the margin says that "),
)
_CLOSINGS = (
    *("", "", "", " This was confirmed later.", " So it was agreed.", " The rest is of no importance here."),
    *(" Few people know it.", " It has not changed since.", " More about that another time."),
)
_QUESTIONS = (
    "What is the {n} of {e}?",
    "Which {n} is given for {e}?",
    "Can you recall the {n} of {e}?",
    "Please name the {n} of {e}.",
    "About {e}: what is the {n}?",
    "I need the {n} of {e}; what does the text say?",
    "Tell me the {n} of {e}.",
    "According to the text, what is the {n} of {e}?",
    "What did we read about the {n} of {e}?",
)
_LEADS = (
    "The {n} of {e} is",
    "According to the text, the {n} of {e} is",
    "As was said, the {n} of {e} is",
    "Answer: the {n} of {e} is",
    "In the text, the {n} of {e} is",
    "The text says that the {n} of {e} is",
)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """One way to tell and to ask. Texts with {n}, {e}, {v}."""

    statement: str
    question: str
    lead: str


def wording(rng: np.random.Generator, *, unseen: bool) -> Wording:
    """A random one."""

    def pick(texts: tuple[str, ...]) -> str:
        return str(rng.choice(_part(texts, unseen)))

    statement = f"{pick(_OPENINGS)}{pick(_STATEMENTS)}"
    return Wording(statement=_raised(statement) + pick(_CLOSINGS), question=pick(_QUESTIONS), lead=pick(_LEADS))


def count(*, unseen: bool) -> int:
    """How many wordings there are."""
    parts = [_part(tuple(dict.fromkeys(texts)), unseen) for texts in (_STATEMENTS, _OPENINGS, _CLOSINGS, _QUESTIONS)]
    return int(np.prod([len(part) for part in [*parts, _part(_LEADS, unseen)]]))


def fill(text: str, *, n: str, e: str, v: str) -> str:
    """A wording's text with its words in it, and a capital at its beginning."""
    return _raised(text.format(n=n, e=e, v=v))


def _raised(text: str) -> str:
    return text if text.startswith("{") else text[:1].upper() + text[1:]


def _part(texts: tuple[str, ...], unseen: bool) -> list[str]:
    return [text for i, text in enumerate(texts) if (i % 3 == 2) == unseen]
