"""How an attached model forwards without a cache: hard marks (the default), eviction off, or training's soft gate."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.modeling.attach import attachment_of, check_budget
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.quest import DMSQuestPolicy


@dataclass(kw_only=True)
class SoftGates:
    """Gumbel-sigmoid gates with temperature tau; remembers what they drew.

    With a seed, the noise is decided by (seed, layer, row of the whole batch) alone: a layer that gradient
    checkpointing runs again draws the same, and the ranks of a distributed run draw together what one process would.
    The next seed's noise is drawn into the same tensors, so that a recorded step reads it.
    """

    tau: float
    seed: int | None = None
    shared: bool = False
    """One draw for all KV heads of a layer: its heads decide alike."""
    part: int = 0
    parts: int = 1
    """This forward's batch is piece `part` of `parts` equal pieces of the whole batch."""
    gates: dict[int, Tensor] = field(default_factory=dict)
    """By governed layer, float32 [B * S, kv_heads]: l; alpha = sigmoid(l), a hard mark is l > 0."""
    _noise: dict[int, Tensor] = field(default_factory=dict)
    """By layer, float32 [B * S, kv_heads or 1], of this seed."""

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        gate = (logits + self._noise_of(layer, logits)) / self.tau
        self.gates.setdefault(layer, gate)  # not what gradient checkpointing runs again
        return dms.log_keep(gate)

    def begin(self, *, seed: int, part: int = 0, parts: int = 1) -> None:
        """Forget the last forward's gates; the next one draws from this seed."""
        self.seed, self.part, self.parts = seed, part, parts
        self.gates = {}
        for layer, noise in self._noise.items():
            noise.copy_(self._drawn(layer, noise))

    def _noise_of(self, layer: int, logits: Tensor) -> Tensor:
        like = logits[:, :1] if self.shared else logits
        if self.seed is None:
            return self._drawn(layer, like)
        held = self._noise.get(layer)
        if held is None or held.shape != like.shape:
            held = self._noise[layer] = self._drawn(layer, like)
        return held

    def _drawn(self, layer: int, like: Tensor) -> Tensor:
        """This forward's part of the noise of the whole batch, of the shape and on the device of `like`."""
        tokens, heads = like.shape
        generator = None
        if self.seed is not None:
            generator = torch.Generator(device=like.device).manual_seed(self.seed * 1009 + layer)
        noise = dms.logistic((self.parts * tokens, heads), generator=generator, device=like.device)
        return noise[self.part * tokens : (self.part + 1) * tokens]


@contextmanager
def soft(model: PreTrainedModel, *, tau: float, seed: int | None = None, shared: bool = False) -> Iterator[SoftGates]:
    """Within, cache-free forwards use the soft gate; yields the gates they draw. The backward of a model with gradient
    checkpointing must be within too."""
    attachment = attachment_of(model)
    attachment.gates = SoftGates(tau=tau, seed=seed, shared=shared)
    try:
        yield attachment.gates
    finally:
        attachment.gates = None


@contextmanager
def governed(model: PreTrainedModel, policy: Policy) -> Iterator[None]:
    """Within, another policy governs the full-attention layers (a model's own sliding windows stay). For policies
    without parameters of their own.

    Raises ValueError for a budget beyond the model's context.
    """
    attachment = attachment_of(model)
    check_budget(policy, attachment.max_tokens)
    layers = [attached for attached in attachment.layers if attached.policy is attachment.policy]
    previous = attachment.policy

    def install(which: Policy) -> None:
        attachment.policy = which
        for attached in layers:
            attached.policy = which

    install(policy)
    try:
        yield
    finally:
        install(previous)


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[None]:
    """Within, nothing is forgotten (a model's own sliding windows stay)."""
    with governed(model, Policy()):
        yield


@contextmanager
def dialled(policy: DMSPolicy, offset: float) -> Iterator[None]:
    """Within, the policy's dial stands at `offset`."""
    previous, policy.offset = policy.offset, offset
    try:
        yield
    finally:
        policy.offset = previous


@contextmanager
def reading(policy: DMSQuestPolicy, budget: int) -> Iterator[None]:
    """Within, a query of the policy reads about so many tokens, in a SparseCache (graphs of the engine keep theirs)."""
    previous, policy.budget = policy.budget, budget
    try:
        yield
    finally:
        policy.budget = previous


@contextmanager
def original(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model is what it was before attach: nothing is forgotten, an adapter's LoRA is out and
    a neuron source's channel is in."""
    attachment = attachment_of(model)
    kept, attachment.keep = attachment.keep, 1.0
    try:
        with dense(model), nullcontext() if attachment.lora is None else attachment.lora.out():
            yield
    finally:
        attachment.keep = kept
