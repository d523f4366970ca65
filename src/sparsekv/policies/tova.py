"""TOVA: the slot that the last query attended to least goes, one choice for all heads of a layer (arXiv 2401.06104).

importance[s] = mean over the layer's query heads of the last query's weight on slot s. A prompt keeps the `budget` most
important under its last query. Token t takes the slot that was least important to query t - 1, which may be the newest.
"""

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.layout import Batch, LayerPages
from sparsekv.ops.weigh import weigh
from sparsekv.policies.base import Prompt, Step
from sparsekv.policies.budget import BudgetPolicy, keep_most, least_of


class TOVAPolicy(BudgetPolicy):
    """Holds `budget` tokens per head, the same ones in all heads of a layer."""

    name = "tova"
    weighs = True
    ranks_by_weights = True

    def state(self, shape: HeadShape) -> list[State]:
        query = (shape.kv_heads * shape.group, shape.dim)
        return [
            State(name="query", kind="row", shape=query, dtype=shape.dtype),
            State(name="victim", kind="row", dtype=torch.int64),
        ]

    def victims(self, step: Step, pages: LayerPages) -> Tensor:
        victim = step.state.row["victim"][step.batch.rows]
        return victim[:, None].expand(-1, pages.lengths.shape[1])

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        rows, state = step.batch.rows, step.state.row
        if step.decoding:
            importance = _importance(pages, step.batch, step.query, scale=step.scale, longest=step.most, lse=lse)
            state["victim"][rows] = least_of(importance, _live(pages, rows, importance))
            return
        last = (step.batch.starts[1:].long() - 1).clamp(min=0)
        some = (step.batch.counts > 0)[:, None, None]
        state["query"][rows] = torch.where(some, step.query[last], state["query"][rows])

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        rows, state = prompt.rows, prompt.state.row
        query = state["query"][rows]
        importance = _importance(pages, prompt.one_each(), query, scale=prompt.scale, longest=prompt.most)
        keep = keep_most(importance, _live(pages, rows, importance), None, budget=self.budget)
        victim = least_of(importance, keep)
        state["victim"][rows] = keep.cumsum(-1).gather(-1, victim[:, None])[:, 0] - 1
        return keep[:, None].expand(-1, pages.lengths.shape[1], -1)


def _importance(
    pages: LayerPages, batch: Batch, query: Tensor, *, scale: float, longest: int, lse: Tensor | None = None
) -> Tensor:
    """[B, W]: the sum over all query heads, which orders slots as the mean does."""
    return weigh(pages, batch, query, scale=scale, longest=longest, lse=lse).sum(1)


def _live(pages: LayerPages, rows: Tensor, importance: Tensor) -> Tensor:
    slot = torch.arange(importance.shape[-1], device=rows.device)
    return slot < pages.lengths[rows, :1]
