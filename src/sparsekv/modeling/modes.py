"""How an attached model forwards without a cache: hard marks (the default), eviction off, or training's soft gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.modeling.attach import attachment_of
from sparsekv.policies import Policy


@dataclass(kw_only=True)
class SoftGates:
    """Gumbel-sigmoid gates with temperature tau; remembers what they drew."""

    tau: float
    generator: torch.Generator | None = None
    gates: list[Tensor] = field(default_factory=list)
    """Per governed layer in forward order, float32 [B * S, kv_heads]: l; alpha = sigmoid(l), a hard mark is l > 0."""

    def __call__(self, logits: Tensor) -> Tensor:
        gate = dms.gate_logits(logits, tau=self.tau, generator=self.generator)
        self.gates.append(gate)
        return dms.log_keep(gate)


@contextmanager
def soft(model: PreTrainedModel, *, tau: float, generator: torch.Generator | None = None) -> Iterator[SoftGates]:
    """Within, cache-free forwards use the soft gate; yields the gates they draw."""
    attachment = attachment_of(model)
    attachment.gates = SoftGates(tau=tau, generator=generator)
    try:
        yield attachment.gates
    finally:
        attachment.gates = None


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[None]:
    """Within, nothing is forgotten (a model's own sliding windows stay): the teacher's forward."""
    attachment = attachment_of(model)
    governed = [site for site in attachment.sites if site.policy is attachment.policy]
    for site in governed:
        site.policy = Policy()
    try:
        yield
    finally:
        for site in governed:
            site.policy = attachment.policy
