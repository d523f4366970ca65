"""Training's long-range retrieval: one to nine facts in mixed templates at random depth, some or all of them asked.

Without it retrieval is lost at any ratio above 3: ordinary text hardly ever asks for a token that is a thousand back.
The templates and words are those of evals/templates.py that the evaluation does not use.
"""

import numpy as np

from sparsekv.evals.items import Fact, Item, ItemBuilder
from sparsekv.evals.templates import TRAINING, Template, chain

_FAMILIES: dict[str, list[Template]] = {}
for _template in TRAINING:
    _FAMILIES.setdefault(_template.family, []).append(_template)

CHAIN_SHARE = 0.1
MAX_FAMILIES = 3
MAX_FACTS = 3
"""Facts of one family in one item."""
TOKENS_PER_FACT = 160
"""Short rows get fewer facts."""


def training_item(builder: ItemBuilder, rng: np.random.Generator, length: int) -> Item:
    """A random item of exactly `length` tokens (256 or more), all of it decided by `rng`."""
    style = str(rng.choice(builder.styles))
    if rng.random() < CHAIN_SHARE:
        facts = chain(rng, int(rng.integers(2, 4)))
        return builder.build(rng, facts, asked=[len(facts) - 1], length=length, style=style, ordered=True)
    facts = _facts(rng)[: max(1, length // TOKENS_PER_FACT)]
    asked = rng.permutation(len(facts))[: int(rng.integers(1, len(facts) + 1))].tolist()
    return builder.build(rng, facts, asked=asked, length=length, style=style)


def _facts(rng: np.random.Generator) -> list[Fact]:
    """Distinct families, so that no two facts contradict each other."""
    families = rng.permutation(list(_FAMILIES))[: int(rng.integers(1, MAX_FAMILIES + 1))].tolist()
    facts: list[Fact] = []
    for family in families:
        wordings = _FAMILIES[family]
        facts += wordings[int(rng.integers(len(wordings)))].facts(rng, int(rng.integers(1, MAX_FACTS + 1)))
    return facts
