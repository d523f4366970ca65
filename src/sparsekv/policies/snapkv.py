"""SnapKV: the prompt is pruned once, by what its last queries attend to; what follows is appended (arXiv 2404.14469).

Per KV head, importance[s] = the weights of the prompt's last 32 queries on slot s, summed over them and the group, for
the tokens before the last 32, then averaged over 5 neighbours (zeros beyond the edges, divisor 5). The last 32 tokens
and the most important budget - 32 others stay.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.layout import Batch, LayerPages
from sparsekv.ops.weigh import weigh
from sparsekv.policies.base import Policy, Prompt, Step
from sparsekv.policies.budget import check_budget, keep_most

WINDOW, KERNEL = 32, 5


class SnapKVPolicy(Policy):
    """Keeps `budget` tokens of the prompt, and all that follow."""

    name = "snapkv"
    masks = False
    prunes = True
    budgets_prompt = True
    rewrites = True
    ranks_by_weights = True

    def __init__(self, *, budget: int) -> None:
        check_budget(self.name, budget, least=WINDOW + 1)
        self.budget = budget

    def most_held(self, layer: int, *, prompt: int, tokens: int) -> int:
        return min(tokens, self.budget + tokens - prompt)

    def state(self, shape: HeadShape) -> list[State]:
        queries = (WINDOW, shape.kv_heads * shape.group, shape.dim)
        return [
            State(name="queries", kind="row", shape=queries, dtype=shape.dtype),
            State(name="count", kind="row", dtype=torch.int32),
        ]

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        """Remember a prompt's last queries, the newest at the end."""
        if step.decoding:
            return
        rows, state, batch = step.batch.rows, step.state.row, step.batch
        queries, counts = state["queries"], batch.counts.long()
        back = torch.arange(WINDOW - 1, -1, -1, device=rows.device)  # 0 is the newest
        new = step.query[(batch.starts[1:, None].long() - 1 - back).clamp(min=0)]
        old_place = (WINDOW - 1 - back + counts[:, None]).clamp(max=WINDOW - 1)
        old = queries[rows].gather(1, old_place[:, :, None, None].expand_as(new))
        queries[rows] = torch.where((back < counts[:, None])[..., None, None], new, old)
        state["count"][rows] = (state["count"][rows] + batch.counts).clamp(max=WINDOW)

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        rows, state = prompt.rows, prompt.state.row
        importance = self._importance(prompt, pages)
        slot = torch.arange(importance.shape[-1], device=rows.device)
        length = pages.lengths[rows][..., None]
        live, earlier = slot < length, slot < length - WINDOW
        pooled = avg_pool1d(importance.masked_fill(~earlier, 0), KERNEL, stride=1, padding=KERNEL // 2)
        state["count"][rows] = 0
        return keep_most(pooled, live, live & ~earlier, budget=self.budget)

    def _importance(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        """[B, H, W]. Of the 32 places of each row only the last `count` hold queries: those are packed together."""
        queries, count = prompt.state.row["queries"][prompt.rows], prompt.state.row["count"][prompt.rows]
        empty = torch.arange(WINDOW, device=count.device) < WINDOW - count[:, None]
        packed = queries.flatten(0, 1)[empty.flatten().int().sort(stable=True).indices]
        starts = pad(count.cumsum(0, dtype=torch.int32), (1, 0))
        batch = Batch(rows=prompt.rows, starts=starts, longest=WINDOW)
        return weigh(pages, batch, packed, scale=prompt.scale, longest=prompt.most)
