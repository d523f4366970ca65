"""Random eviction: the control that every method must beat (arXiv 2609.03430).

Per KV head, uniform among the slots that are neither of the prompt nor among the newest R = min(64, floor(budget / 2)),
the new one included. Where P prompt tokens and R do not fit in the budget, the prompt outside the recent window is not
safe either, and is pruned uniformly. Every draw depends on (seed, sample, layer, head, position) alone, of a prompt on
sample 0, since copies share it:

    decode, token t   the floor(u(t) * n)-th of n candidates, in slot order, goes
    prompt            of the tokens that are not safe those with the largest u(position) stay
"""

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.layout import LayerPages, held_slots
from sparsekv.ops.noise import uniform
from sparsekv.policies.age import BORN, births, record_births
from sparsekv.policies.base import Prompt, Step
from sparsekv.policies.budget import BudgetPolicy, keep_most

RECENT = 64


class RandomPolicy(BudgetPolicy):
    """Holds `budget` tokens per head, chosen by chance."""

    name = "random"
    least = 2

    def __init__(self, *, budget: int, seed: int = 0) -> None:
        super().__init__(budget=budget)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; use an integer")
        self.seed = seed % 2**63
        self.recent = min(RECENT, budget // 2)

    def state(self, shape: HeadShape) -> list[State]:
        prompt = State(name="prompt", kind="slot", dtype=torch.bool)
        return [BORN, prompt, State(name="prompt_tokens", kind="row", dtype=torch.int32)]

    def victims(self, step: Step, pages: LayerPages) -> Tensor:
        assert step.samples is not None
        at, live = held_slots(pages, step.batch.rows, self.budget)
        old = births(step.state, at) <= step.seen[:, None, None] - self.recent
        rows = step.batch.rows
        candidates = live & old & ~(self._of_prompt(step.state.slot, at) & self._fits(step.state.row, rows))
        drawn = self._draw(step.layer, step.samples, step.seen[:, None, None], pages)[..., 0]
        order = candidates.cumsum(-1)
        chosen = (drawn * order[..., -1]).long()
        return (order <= chosen[..., None]).sum(-1).clamp(max=at.shape[-1] - 1)

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        new = record_births(step, pages, slots)
        step.state.slot["prompt"].view(-1)[new] = torch.full_like(new, not step.decoding, dtype=torch.bool)
        if not step.decoding:
            tokens = step.state.row["prompt_tokens"]
            tokens[step.batch.rows] += step.batch.counts

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        at, live = held_slots(pages, prompt.rows, prompt.most)
        born = births(prompt.state, at)
        safe = born >= pages.seen[prompt.rows][:, None, None] - self.recent
        safe |= self._of_prompt(prompt.state.slot, at) & self._fits(prompt.state.row, prompt.rows)
        drawn = self._draw(prompt.layer, torch.zeros_like(prompt.samples), born, pages)
        return keep_most(drawn, live, safe, budget=self.budget)

    def _of_prompt(self, slot: dict[str, Tensor], at: Tensor) -> Tensor:
        return slot["prompt"].view(-1)[at]

    def _fits(self, row: dict[str, Tensor], rows: Tensor) -> Tensor:
        """bool [B, 1, 1]: whether prompt and recent window fit in the budget."""
        return (row["prompt_tokens"][rows] + self.recent <= self.budget)[:, None, None]

    def _draw(self, layer: int, samples: Tensor, positions: Tensor, pages: LayerPages) -> Tensor:
        """float64 [B, H, n]; positions: [B, 1 or H, n]."""
        seed = torch.full((), self.seed, device=samples.device)
        layer_ = torch.full((), layer, device=samples.device)
        head = torch.arange(pages.lengths.shape[1], device=samples.device)[:, None]
        return uniform(seed, samples[:, None, None], layer_, head, positions.long())
