"""What methods with a budget share: the prompt is read densely and pruned once when it is over; from then on a head
that holds `budget` tokens gives one of its slots to each new token.

Of equals the lowest slot goes, and a pruning keeps the order of arrival.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages
from sparsekv.policies.base import Policy, Step


class BudgetPolicy(Policy):
    """A KV head holds at most `budget` tokens once the prompt is over, the newest included.

    Raises ValueError for a budget below `least`.
    """

    masks = False
    prunes = True
    rewrites = True
    least: ClassVar[int] = 1
    """The smallest budget that the method can have."""

    def __init__(self, *, budget: int) -> None:
        check_budget(self.name, budget, least=self.least)
        self.budget = budget

    def most_held(self, layer: int, *, prompt: int, tokens: int) -> int:
        return min(tokens, self.budget)

    def appends(self, pages: LayerPages) -> Tensor:
        return pages.lengths < self.budget

    def slots(self, step: Step, pages: LayerPages) -> Tensor:
        full = pages.lengths[step.batch.rows] >= self.budget
        return torch.where(full, self.victims(step, pages), -1).int()

    @abstractmethod
    def victims(self, step: Step, pages: LayerPages) -> Tensor:
        """int64 [B, H]: the slot that the decoded token takes where the budget is full."""


def check_budget(name: str, budget: int, *, least: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"budget is {budget!r}; it counts tokens, so use an integer")
    if budget < least:
        raise ValueError(f"budget is {budget} and policy {name!r} needs at least {least}; raise it")


def least_of(importance: Tensor, eligible: Tensor) -> Tensor:
    """int64 [...]: the first eligible slot of the least importance; both [..., W]."""
    return importance.masked_fill(~eligible, torch.inf).argmin(-1)


def keep_most(importance: Tensor, live: Tensor, safe: Tensor | None, *, budget: int) -> Tensor:
    """bool [..., W]: of the live slots the safe ones, and those of the greatest importance that the budget leaves."""
    if safe is not None:
        importance = importance.masked_fill(safe, torch.inf)
    importance = importance.masked_fill(~live, -torch.inf)
    count = min(budget, importance.shape[-1])
    least = importance.topk(count, dim=-1).values[..., -1:]
    above, equal = importance > least, importance == least
    from_the_end = equal.flip(-1).cumsum(-1).flip(-1)
    return live & (above | equal & (from_the_end <= count - above.sum(-1, keepdim=True)))
