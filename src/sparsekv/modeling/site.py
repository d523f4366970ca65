"""What attach() leaves on each attention module: which policy governs it, and the forward it is in."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache

from sparsekv.dms import NeuronSource
from sparsekv.policies import Policy

SITE = "sparsekv_site"
"""The attribute of an attention module that holds its Site."""


@dataclass(kw_only=True)
class Site:
    """One attention layer of an attached model."""

    layer: int
    policy: Policy
    attachment: "Attachment"
    hidden: Tensor | None = None
    """What the policy decides from, in the forward under way: the layer's input [B, S, hidden_size] or, with a neuron
    source, the logits [B, S, kv_heads] that it read."""
    cache: "PagedCache | None" = None
    neuron: NeuronSource | None = None


class PagedCache(Cache):
    """A Cache that attends for itself, in pages: SparseCache, and the engine's."""

    @abstractmethod
    def attend(
        self, site: Site, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scale: float
    ) -> Tensor:
        """One layer of a forward. hidden: [B, S, hidden_size]; q: [B, H * G, S, D]; k, v: [B, H, S, D]; mask: bool
        [B, columns + S] or None. Returns [B, S, H * G, D]."""


@dataclass(kw_only=True)
class Attachment:
    """What attach() did to a model, and what detach() undoes."""

    policy: Policy
    kv_heads: int
    head_dim: int
    max_tokens: int
    """The model's context length."""
    sites: list[Site] = field(default_factory=list)
    gates: Callable[[Tensor], Tensor] | None = None
    """In training: logits -> log(1 - alpha), see modes.soft."""
    undo: list[Callable[[], Any]] = field(default_factory=list)
