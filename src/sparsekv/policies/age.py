"""The position at which the token of a slot was seen: what methods remember that keep the newest tokens."""

import torch
from torch import Tensor

from sparsekv.cache.state import LayerState, State
from sparsekv.ops.layout import LayerPages, appended
from sparsekv.policies.base import Step

BORN = State(name="born", kind="slot", dtype=torch.int32, fill=-1)


def births(state: LayerState, at: Tensor) -> Tensor:
    """int32, of slots `at` (ops.layout.held_slots), int64 of any shape."""
    return state.slot["born"].view(-1)[at]


def record_births(step: Step, pages: LayerPages) -> Tensor:
    """Note the tokens of a prefill; returns where they lie, int64 [T, H]. A decode step: ops.evict.record."""
    at = appended(pages, step.batch, step.key.shape[0])
    step.state.slot["born"].view(-1)[at] = step.positions[:, None].expand_as(at)
    return at
