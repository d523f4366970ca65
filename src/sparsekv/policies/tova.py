"""TOVA: the slot that the last query attended to least goes, one choice for all heads of a layer (arXiv 2401.06104).

importance[s] = mean over the layer's query heads of the last query's weight on slot s. A prompt keeps the `budget` most
important under its last query. Token t takes the slot that was least important to query t - 1, which may be the newest.
"""

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.evict import least_shared, when_full
from sparsekv.ops.layout import LayerPages
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

    def slots(self, step: Step, pages: LayerPages) -> Tensor:
        return when_full(pages, step.batch.rows, step.state.row["victim"], budget=self.budget)

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        rows, state = step.batch.rows, step.state.row
        if step.decoding:
            weights = weigh(pages, step.batch, step.query, scale=step.scale, longest=step.most, lse=lse)
            least_shared(pages, rows, weights, state["victim"])
            return
        last = (step.batch.starts[1:].long() - 1).clamp(min=0)
        some = (step.batch.counts > 0)[:, None, None]
        state["query"][rows] = torch.where(some, step.query[last], state["query"][rows])

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        rows, state = prompt.rows, prompt.state.row
        query = state["query"][rows]
        # The sum over all query heads orders slots as the mean does.
        importance = weigh(pages, prompt.one_each(), query, scale=prompt.scale, longest=prompt.most).sum(1)
        live = torch.arange(importance.shape[-1], device=rows.device) < pages.lengths[rows, :1]
        keep = keep_most(importance, live, None, budget=self.budget)
        victim = least_of(importance, keep)
        state["victim"][rows] = keep.cumsum(-1).gather(-1, victim[:, None])[:, 0] - 1
        return keep[:, None].expand(-1, pages.lengths.shape[1], -1)
