"""Two tasks of RULER (arXiv 2404.06654) as facts for items.

multi-needle        niah_multiquery: NEEDLES numbers told under different keys, all asked for in one question
variable tracking   one chain of HOPS assignments, told in order; which variables hold the first one's value?
"""

import string
from dataclasses import replace

import numpy as np

from sparsekv.evals.items import Fact
from sparsekv.evals.templates import Template

NEEDLES, HOPS = 4, 4
_NEEDLE = Template(
    family="multi-needle",
    statement="One of the special magic numbers for {word} is: {d7}.",
    question="What is the special magic number for {word}?",
    lead="The special magic number for {word} is",
    answer="{d7}",
)


def multi_needle(rng: np.random.Generator) -> list[Fact]:
    """NEEDLES facts; the first carries the question for all of them."""
    facts = _NEEDLE.facts(rng, NEEDLES, unseen=True)
    keys = _listed([fact.lead.split()[-2] for fact in facts])
    first = replace(
        facts[0],
        question=f"What are all the special magic numbers for {keys} mentioned in the provided text?",
        lead=f"The special magic numbers for {keys} mentioned in the provided text are",
        more=tuple(fact.answer for fact in facts[1:]),
    )
    return [first, *facts[1:]]


def variable_tracking(rng: np.random.Generator) -> list[Fact]:
    """HOPS + 1 facts, to be told in order; the first carries the question."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choice(list(string.ascii_uppercase), 5))
        names += [name] if name not in names else []
    value = str(rng.integers(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    first, *rest = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    question = f"Find all variables that are assigned the value {value} in the text above."
    lead = (
        "According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    asked = Fact(statement=first, question=question, lead=lead, answer=names[0], more=tuple(names[1:]))
    return [asked, *(Fact(statement=text, question="", lead="", answer="") for text in rest)]


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])}, and {words[-1]}"
