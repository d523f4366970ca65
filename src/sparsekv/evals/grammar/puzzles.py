"""A puzzle: facts that are told, of which the first is asked about.

direct     one entity's relation, in a sentence or a block of a few entities
rivals     as many entities with the same relation, in as many sentences or one block
two hops   "the profession of the captain of the ship X": two facts, told apart
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from sparsekv.evals.grammar import forms, words
from sparsekv.evals.grammar.wordings import fill, wording
from sparsekv.evals.items import Fact

WAYS = ("direct", "rivals", "two hops")
RIVALS = 16
BLOCK = 4
"""Entities of a block that is asked directly."""
COLUMNS = 3
"""Relations of a block of so many, at most; a longer one has up to two."""
SENTENCE = "sentence"


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What can be said of a kind of entity."""

    entity: str
    name: str
    value: str
    """The value's kind."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of the grammar: training's, or what only the evaluation has."""

    relations: bool = False
    """Relations that training never uses."""
    wordings: bool = False
    """Wordings, and words in names and values, that it never uses."""
    forms: bool = False
    """Blocks in forms that it never uses, instead of its own."""


def puzzle(rng: np.random.Generator, way: str, form: str, *, part: Part, rivals: int = RIVALS) -> list[Fact]:
    """form: "sentence", or one of forms_of. Raises ValueError for an unknown way."""
    if way not in WAYS:
        raise ValueError(f"a puzzle is {way!r}; it is one of {', '.join(WAYS)}")
    if way == "two hops":
        return _two_hops(rng, part)
    relation = _pick(rng, relations(unseen=part.relations))
    if form == SENTENCE:
        names = _names(rng, relation.entity, 1 if way == "direct" else rivals, part)
        return [_fact(rng, relation, name, _value(rng, relation, part), part) for name in names]
    return [_block(rng, relation, form, entities=min(BLOCK, rivals) if way == "direct" else rivals, part=part)]


def forms_of(part: Part) -> list[str]:
    """The forms of blocks."""
    return list(forms.UNSEEN if part.forms else forms.TRAINED)


def relations(*, unseen: bool) -> list[Relation]:
    """Training's three of four, or the evaluation's."""
    return [relation for i, relation in enumerate(_ALL) if (i % 4 == 3) == unseen]


def _block(rng: np.random.Generator, relation: Relation, form: str, *, entities: int, part: Part) -> Fact:
    others = [r for r in relations(unseen=part.relations) if r.entity == relation.entity and r != relation]
    columns = int(rng.integers(1, COLUMNS + 1 if entities <= BLOCK else COLUMNS))
    more = rng.permutation(len(others))[: columns - 1].tolist()
    chosen = [relation, *(others[i] for i in more)]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    names = _names(rng, relation.entity, entities, part)
    rows = {name: {r.name: _value(rng, r, part) for r in chosen} for name in names}
    asked = names[int(rng.integers(len(names)))]
    told = (forms.UNSEEN | forms.TRAINED)[form](rows)
    words_of = wording(rng, unseen=part.wordings)
    filled = {"n": relation.name, "e": asked, "v": rows[asked][relation.name]}
    return Fact(
        statement=told,
        question=fill(words_of.question, **filled),
        lead=fill(words_of.lead, **filled),
        answer=filled["v"],
        begun=words.made_up(relation.value),
    )


def _two_hops(rng: np.random.Generator, part: Part) -> list[Fact]:
    known = relations(unseen=part.relations)
    first = _pick(rng, [r for r in known if r.value == "person" and r.entity != "person"])
    second = _pick(rng, [r for r in known if r.entity == "person" and r.value != "person"])
    (thing,), (person,) = _names(rng, first.entity, 1, part), _names(rng, "person", 1, part)
    end = _fact(rng, second, person, _value(rng, second, part), part)
    asked = wording(rng, unseen=part.wordings)
    filled = {"n": second.name, "e": f"the {first.name} of {thing}", "v": end.answer}
    question, lead = fill(asked.question, **filled), fill(asked.lead, **filled)
    asking = Fact(statement=end.statement, question=question, lead=lead, answer=end.answer, begun=end.begun)
    return [asking, _fact(rng, first, thing, person, part)]


def _fact(rng: np.random.Generator, relation: Relation, name: str, value: str, part: Part) -> Fact:
    chosen = wording(rng, unseen=part.wordings)
    filled = {"n": relation.name, "e": name, "v": value}
    return Fact(
        statement=fill(chosen.statement, **filled),
        question=fill(chosen.question, **filled),
        lead=fill(chosen.lead, **filled),
        answer=value,
        begun=words.made_up(relation.value),
    )


def _names(rng: np.random.Generator, kind: str, count: int, part: Part) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[words.entity(rng, kind, unseen=part.wordings)] = None
    return list(found)


def _value(rng: np.random.Generator, relation: Relation, part: Part) -> str:
    return words.value(rng, relation.value, unseen=part.wordings)


def _pick(rng: np.random.Generator, found: Sequence[Relation]) -> Relation:
    return found[int(rng.integers(len(found)))]


def _load() -> list[Relation]:
    text = files("sparsekv.evals.grammar").joinpath("relations.txt").read_text(encoding="utf-8")
    lines = [line.split(": ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [(entity, *pair.split("=")) for entity, listed in lines for pair in listed.split(", ")]
    return [Relation(entity=entity, name=name, value=value) for entity, name, value in pairs]


_ALL = _load()
