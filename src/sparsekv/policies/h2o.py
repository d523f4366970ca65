"""H2O, heavy hitters: the slot that all queries so far attended to least goes, per KV head (arXiv 2306.14048).

importance[s] = sum of the weights on slot s over all queries since it was written and over the group's query heads,
never renormalised. The newest floor(budget / 2) tokens, the new one included, are safe.
"""

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.evict import least_important, record
from sparsekv.ops.layout import LayerPages, held_slots
from sparsekv.ops.weigh import weigh
from sparsekv.policies.age import BORN, births, record_births
from sparsekv.policies.base import Prompt, Step
from sparsekv.policies.budget import BudgetPolicy, keep_most


class H2OPolicy(BudgetPolicy):
    """Holds `budget` tokens per head: the newest half, and the heavy hitters among the others."""

    name = "h2o"
    weighs = True
    pads_chunks = False
    ranks_by_weights = True

    def state(self, shape: HeadShape) -> list[State]:
        return [BORN, State(name="weight", kind="slot", dtype=shape.wide)]

    def slots(self, step: Step, pages: LayerPages) -> Tensor:
        slot, safe = step.state.slot, self.budget // 2
        options = {"seen": step.seen, "safe": safe, "budget": self.budget}
        return least_important(pages, step.batch.rows, slot["weight"], slot["born"], **options)

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        slot = step.state.slot
        if step.decoding:
            assert slots is not None
            record(pages, step.batch.rows, slots, slot["born"], seen=step.seen, weight=slot["weight"])
            return
        new = record_births(step, pages)
        slot["weight"].view(-1)[new] = torch.zeros_like(new, dtype=slot["weight"].dtype)

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        options = {"scale": step.scale, "longest": step.most, "lse": lse, "into": step.state.slot["weight"]}
        weigh(pages, step.batch, step.query, **options)

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        at, live = held_slots(pages, prompt.rows, prompt.most)
        seen = pages.seen[prompt.rows][:, None, None]
        newest = births(prompt.state, at) >= seen - self.budget // 2
        return keep_most(prompt.state.slot["weight"].view(-1)[at], live, newest, budget=self.budget)
