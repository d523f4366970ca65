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
from sparsekv.ops.evict import at_random, record
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

    def slots(self, step: Step, pages: LayerPages) -> Tensor:
        assert step.samples is not None
        slot, tokens = step.state.slot, step.state.row["prompt_tokens"]
        return at_random(
            pages,
            step.batch.rows,
            slot["born"],
            slot["prompt"],
            tokens,
            seen=step.seen,
            samples=step.samples,
            seed=self.seed,
            layer_index=step.layer,
            recent=self.recent,
            budget=self.budget,
        )

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        slot = step.state.slot
        if step.decoding:
            assert slots is not None
            record(pages, step.batch.rows, slots, slot["born"], seen=step.seen, prompt=slot["prompt"])
            return
        new = record_births(step, pages)
        slot["prompt"].view(-1)[new] = torch.ones_like(new, dtype=torch.bool)
        tokens = step.state.row["prompt_tokens"]
        tokens[step.batch.rows] += step.batch.counts

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor:
        at, live = held_slots(pages, prompt.rows, prompt.most)
        born = births(prompt.state, at)
        safe = born >= pages.seen[prompt.rows][:, None, None] - self.recent
        fits = prompt.state.row["prompt_tokens"][prompt.rows] + self.recent <= self.budget
        safe |= prompt.state.slot["prompt"].view(-1)[at] & fits[:, None, None]
        return keep_most(self._draw(prompt.layer, born), live, safe, budget=self.budget)

    def _draw(self, layer: int, positions: Tensor) -> Tensor:
        """float64 [B, H, n]: of prompt tokens at positions int [B, H, n]; copies share their prompt, so sample 0."""
        device = positions.device
        seed, sample, layer_ = (torch.full((), key, device=device) for key in (self.seed, 0, layer))
        head = torch.arange(positions.shape[1], device=device)[:, None]
        return uniform(seed, sample, layer_, head, positions.long())
