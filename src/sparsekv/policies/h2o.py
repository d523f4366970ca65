"""H2O, heavy hitters: the slot that all queries so far attended to least goes, per KV head (arXiv 2306.14048).

importance[s] = sum of the weights on slot s over all queries since it was written and over the group's query heads,
never renormalised. The newest floor(budget / 2) tokens, the new one included, are safe.
"""

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.layout import LayerPages, held_slots
from sparsekv.ops.weigh import weigh
from sparsekv.policies.age import BORN, births, record_births
from sparsekv.policies.base import Prompt, Step
from sparsekv.policies.budget import BudgetPolicy, keep_most, least_of


class H2OPolicy(BudgetPolicy):
    """Holds `budget` tokens per head: the newest half, and the heavy hitters among the others."""

    name = "h2o"
    weighs = True
    ranks_by_weights = True

    def state(self, shape: HeadShape) -> list[State]:
        return [BORN, State(name="weight", kind="slot", dtype=shape.wide)]

    def victims(self, step: Step, pages: LayerPages) -> Tensor:
        at, live = held_slots(pages, step.batch.rows, self.budget)
        old = births(step.state, at) <= step.seen[:, None, None] - self.budget // 2
        return least_of(_weights(step.state.slot, at), live & old)

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        new = record_births(step, pages, slots)
        weights = step.state.slot["weight"].view(-1)
        weights[new] = torch.zeros_like(new, dtype=weights.dtype)

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        added = weigh(pages, step.batch, step.query, scale=step.scale, longest=step.most, lse=lse)
        at, _ = held_slots(pages, step.batch.rows, step.most)
        weights = step.state.slot["weight"].view(-1)
        weights[at] += added[..., : at.shape[-1]]

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        at, live = held_slots(pages, prompt.rows, prompt.most)
        seen = pages.seen[prompt.rows][:, None, None]
        newest = births(prompt.state, at) >= seen - self.budget // 2
        return keep_most(_weights(prompt.state.slot, at), live, newest, budget=self.budget)


def _weights(slot: dict[str, Tensor], at: Tensor) -> Tensor:
    return slot["weight"].view(-1)[at]
