"""Training's long-range retrieval at random depth: one to nine facts in mixed templates, some or all of them asked;
look-ups among many entries of one template; variable chains. In some the facts are all told long before the question.

Without it retrieval is lost at any ratio above 3: ordinary text hardly ever asks for a token that is a thousand back.
The templates and words are those of evals/templates.py that the evaluation does not use, or facts of the grammar's
training part (evals/grammar/).
"""

import numpy as np

from sparsekv.evals.grammar.puzzles import RIVALS, SENTENCE, Part, forms_of, puzzle
from sparsekv.evals.items import Fact, Item, ItemBuilder
from sparsekv.evals.templates import TRAINING, Template, chain

_FAMILIES: dict[str, list[Template]] = {}
for _template in TRAINING:
    _FAMILIES.setdefault(_template.family, []).append(_template)
_KEYED = [template for template in TRAINING if template.key is not None]

CHAIN_SHARE, LOOK_UP_SHARE = 0.1, 0.25
"""Of the items; the others are facts of mixed families."""
FAR_SHARE, FAR = 0.3, 0.15
"""The part of the items whose facts are all told in the first stretch of the text, and how long that is."""
MAX_FAMILIES = 3
MAX_FACTS = 3
"""Facts of one family in one item."""
MAX_ENTRIES = 16
"""Of a look-up."""
TOKENS_PER_FACT = 160
"""Short rows get fewer facts."""
TOKENS_PER_ENTRY = 64

GRAMMAR_WAYS = ("direct", "direct", "two hops", "rivals", "block")
"""Of a grammar's items, one in five each."""
SENTENCE_SHARE = 0.5
"""Of rivals told in sentences, the others in a block."""
TOKENS_PER_RIVAL, TOKENS_PER_PUZZLE = 96, 512
"""Short rows get fewer."""


def training_item(builder: ItemBuilder, rng: np.random.Generator, length: int, *, grammar: float = 0.0) -> Item:
    """A random item of exactly `length` tokens (256 or more), all of it decided by `rng`. grammar: the share of items
    that the grammar makes, without what it keeps for the evaluation; the others are of templates."""
    if grammar and rng.random() < grammar:
        return grammar_item(builder, rng, length)
    style, kind = str(rng.choice(builder.styles)), rng.random()
    within = FAR if rng.random() < FAR_SHARE else 1.0
    if kind < CHAIN_SHARE:
        facts = chain(rng, int(rng.integers(2, 4)))
        asked = [len(facts) - 1]
        return builder.build(rng, facts, asked=asked, length=length, style=style, ordered=True, within=within)
    if kind < CHAIN_SHARE + LOOK_UP_SHARE:
        facts = _entries(rng)[: max(1, length // TOKENS_PER_ENTRY - 1)]
        questions = min(len(facts), 1 + length // (8 * TOKENS_PER_FACT))
    else:
        facts = _facts(rng)[: max(1, length // TOKENS_PER_FACT)]
        questions = len(facts)
    asked = rng.permutation(len(facts))[: int(rng.integers(1, questions + 1))].tolist()
    return builder.build(rng, facts, asked=asked, length=length, style=style, within=within)


def grammar_item(builder: ItemBuilder, rng: np.random.Generator, length: int) -> Item:
    """Rivals or a block, one of them asked; or several facts, told directly or over two hops, all asked."""
    style, way = str(rng.choice(builder.styles)), str(rng.choice(GRAMMAR_WAYS))
    within = FAR if rng.random() < FAR_SHARE else 1.0
    rivals, part = max(2, min(RIVALS, length // TOKENS_PER_RIVAL)), Part()
    if way in ("rivals", "block"):
        form = SENTENCE if way == "rivals" and rng.random() < SENTENCE_SHARE else str(rng.choice(forms_of(part)))
        facts = puzzle(rng, "rivals" if way == "rivals" else "direct", form, part=part, rivals=rivals)
        return builder.build(rng, facts, asked=[0], length=length, style=style, within=within)
    told: list[Fact] = []
    asked = []
    for _ in range(int(rng.integers(1, 2 + min(MAX_FACTS, length // TOKENS_PER_PUZZLE)))):
        asked.append(len(told))
        told += puzzle(rng, way, SENTENCE, part=part)
    return builder.build(rng, told, asked=asked, length=length, style=style, within=within)


def _entries(rng: np.random.Generator) -> list[Fact]:
    """Many facts of one template, told apart by their keys alone."""
    template = _KEYED[int(rng.integers(len(_KEYED)))]
    return template.facts(rng, int(rng.integers(4, MAX_ENTRIES + 1)))


def _facts(rng: np.random.Generator) -> list[Fact]:
    """Distinct families, so that no two facts contradict each other."""
    families = rng.permutation(list(_FAMILIES))[: int(rng.integers(1, MAX_FAMILIES + 1))].tolist()
    facts: list[Fact] = []
    for family in families:
        wordings = _FAMILIES[family]
        facts += wordings[int(rng.integers(len(wordings)))].facts(rng, int(rng.integers(1, MAX_FACTS + 1)))
    return facts
