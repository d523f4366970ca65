"""A teacher-forced forward of whole texts under an attached policy, with what the cache holds at their end.

Two ways that the tests prove equal: through the real SparseCache in chunks, tokens held as its allocator counts them;
or without a cache, the policy's marks as a mask, tokens held by the rule of the window:
token k of S is gone iff it is marked and k < S - window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.evals.settings import EVICTIONS
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.cache import SparseCache
from sparsekv.modeling.split import SplitModel
from sparsekv.policies import Policy, Step

CHUNK = 2048
"""Tokens of a row that one forward gives to the cache: of a long row only these are ever held densely."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a forward gives."""

    hidden: Tensor
    """[B, S, hidden_size]: the last hidden states, for SplitModel.logits."""
    seen: int
    """B * S."""
    held: float
    """Tokens held at the end, averaged over layers and heads, summed over rows."""


@torch.no_grad()
def read(split: SplitModel, ids: Tensor, *, eviction: str) -> Reading:
    """ids: int64 [B, S], no padding. Raises ValueError for an unknown way."""
    if eviction not in EVICTIONS:
        raise ValueError(f"eviction is {eviction!r}; use one of {', '.join(EVICTIONS)}")
    if eviction == "cache":
        cache = SparseCache(split.model, max_tokens=ids.shape[1])
        hidden = torch.cat([split.hidden(part, cache=cache) for part in ids.split(CHUNK, dim=1)], dim=1)
        return Reading(hidden=hidden, seen=ids.numel(), held=cache.stats().tokens_held)
    with recorded_marks(split.model) as recorded:
        hidden = split.hidden(ids)
    return Reading(hidden=hidden, seen=ids.numel(), held=recorded.held(*ids.shape))


@dataclass(kw_only=True)
class Recorded:
    """The marks of one cache-free forward, by layer."""

    policies: list[Policy]
    """By layer."""
    marks: dict[int, Tensor] = field(default_factory=dict)
    """bool [B * S, kv_heads], by the position that decided."""

    def held(self, rows: int, length: int) -> float:
        """Tokens held after `length` tokens of each of `rows` rows, averaged over layers and heads."""
        held = torch.zeros((), dtype=torch.float64)
        for layer, policy in enumerate(self.policies):
            if layer not in self.marks:
                held += rows * length
                continue
            marks = self.marks[layer].view(rows, length, -1).transpose(1, 2)
            gone = dms.align(marks, policy.lag, fill=False)[..., : max(length - policy.window(layer), 0)]
            held += rows * length - gone.sum().cpu() / marks.shape[1]
        return float(held / len(self.policies))


@contextmanager
def recorded_marks(model: PreTrainedModel) -> Iterator[Recorded]:
    """Within, each cache-free forward leaves its marks behind."""
    policies = [attached.policy for attached in attachment_of(model).layers]
    recorded = Recorded(policies=policies)
    unique = {id(policy): policy for policy in policies}.values()
    for policy in unique:
        policy.marks = _recorder(policy, recorded.marks)
    try:
        yield recorded
    finally:
        for policy in unique:
            del policy.marks


def _recorder(policy: Policy, into: dict[int, Tensor]):
    marks = policy.marks

    def record(step: Step) -> Tensor | None:
        result = marks(step)
        if result is not None:
            into[step.layer] = result
        return result

    return record
