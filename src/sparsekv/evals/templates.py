"""Facts in many wordings. What is learnt in training must be to keep facts, so the evaluation's are never seen there:
other templates, and other names, places and things in them.

A template's slots: pools of words, d<n> (n digits), code (letters and digits), hour. The key slot tells facts of one
template apart; a template without one is told once per text.
"""

import re
import string
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from sparsekv.evals.items import Fact

_POOLS = {
    "name": "Alice Bruno Carla Dmitri Elena Farid Greta Hiro Ingrid Jonas Keiko Liam Marta Nadia Oscar Petra "
    "Quentin Rosa Stefan Tara Umar Vera Walter Ximena Yusuf Zoe",
    "city": "Oslo Lima Cairo Madrid Nairobi Kyoto Toronto Prague Lisbon Dublin Vienna Boston Havana Seoul Warsaw "
    "Geneva Athens Chicago",
    "animal": "tiger rabbit horse eagle dolphin spider turtle wolf parrot camel fox whale lion goat snake owl bear",
    "colour": "red blue green yellow purple orange white black pink brown grey golden",
    "food": "apples bread cheese honey lemons rice olives carrots butter plums mushrooms pepper garlic chocolate",
    "object": "lamp mirror violin clock sword basket crown kettle candle ladder mask drum bottle carpet statue",
    "place": "library harbour museum bakery castle garden station theatre cellar temple market hospital bridge tower",
    "job": "teacher doctor painter farmer pilot lawyer baker sailor nurse engineer writer dentist carpenter singer",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "word": "ocean silver thunder marble lantern forest copper meadow winter crystal feather harvest island pepper "
    "shadow velvet canyon ember falcon granite",
    "word2": "alpha cobalt delta echo gamma helix indigo jasper kappa lotus nectar omega",
    "surname": "Adler Berg Costa Duran Engel Fischer Grant Holm Ibsen Jansen Keller Lund Moreau Novak Olsen Paulsen",
    "instrument": "flute cello harp trumpet organ banjo oboe guitar clarinet piano viola horn",
    "language": "French Danish Greek Polish Turkish Latin Arabic Welsh Finnish Hindi Czech Spanish",
    "sport": "tennis fencing rowing chess archery boxing judo cricket golf curling skating wrestling",
    "metal": "copper tin gold zinc nickel bronze iron cobalt platinum brass lead chromium",
    "drink": "tea coffee cider milk cocoa lemonade wine beer water juice brandy ale",
    "vehicle": "tram bicycle truck canoe sledge scooter carriage ferry tractor wagon balloon helicopter",
}


@dataclass(frozen=True, kw_only=True)
class Template:
    """One way to tell a fact and to ask for it."""

    family: str
    statement: str
    question: str
    lead: str
    answer: str

    @property
    def key(self) -> str | None:
        """The slot that tells facts of this template apart: the first of the lead."""
        return next(iter(_slots(self.lead)), None)

    def facts(self, rng: np.random.Generator, count: int, *, unseen: bool = False) -> list[Fact]:
        """`count` facts with distinct keys (one fact where the template has no key, or its pool fewer words)."""
        slots = _slots(self.statement)
        key = self.key
        keys = [None] if key is None else _distinct(rng, key, count, unseen)
        facts = []
        for value in keys:
            values = {slot: value if slot == key else _draw(rng, slot, unseen) for slot in slots}
            parts = {name: getattr(self, name).format(**values) for name in ("statement", "question", "lead", "answer")}
            facts.append(Fact(**parts))
        return facts


_CHAIN_NAMES = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "zeta", "lambda")


def chain(rng: np.random.Generator, length: int) -> list[Fact]:
    """A variable chain, to be told in order: the last fact's answer is the number given in the first."""
    names = rng.permutation(_CHAIN_NAMES)[:length].tolist()
    number = _draw(rng, "d4", False)
    values = [number, *names[:-1]]
    question = "What number does the variable {} hold?"
    return [
        Fact(
            statement=f"Set the variable {name} to {value}.",
            question=question.format(name),
            lead=f"The variable {name} holds",
            answer=number,
        )
        for name, value in zip(names, values, strict=True)
    ]


def _slots(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", text)))


def _distinct(rng: np.random.Generator, slot: str, count: int, unseen: bool) -> list[str]:
    if slot in _POOLS:
        return rng.permutation(_pool(slot, unseen))[:count].tolist()
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_draw(rng, slot, unseen)] = None
    return list(drawn)


def _draw(rng: np.random.Generator, kind: str, unseen: bool) -> str:
    """A random value of a slot."""
    if kind in _POOLS:
        return str(rng.choice(_pool(kind, unseen)))
    if kind == "code":
        letters = rng.choice(list(string.ascii_uppercase), 2)
        return f"{letters[0]}{rng.integers(10)}{letters[1]}{rng.integers(10)}"
    if kind == "hour":
        return f"{rng.integers(1, 13)}:{rng.integers(6)}{rng.integers(10)}"
    digits = int(kind.removeprefix("d"))
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _pool(kind: str, unseen: bool) -> list[str]:
    """The words that training uses: two of three; the third are the evaluation's."""
    words = _POOLS[kind].split()
    if kind in ("day", "month"):
        return words
    return [word for i, word in enumerate(words) if (i % 3 == 2) == unseen]


def _load() -> dict[str, tuple[Template, ...]]:
    """The sections of templates.txt."""
    sections: dict[str, tuple[Template, ...]] = {}
    section = ""
    for line in files("sparsekv.evals").joinpath("templates.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            sections[section] = ()
        elif line and not line.startswith("#"):
            family, answer, statement, question, lead = line.split(" | ")
            template = Template(family=family, answer=answer, statement=statement, question=question, lead=lead)
            sections[section] += (template,)
    return sections


_SECTIONS = _load()
TRAINING, UNSEEN, LOOK_UP = (_SECTIONS[name] for name in ("training", "unseen", "look-up"))
PASS_KEY = TRAINING[0]
