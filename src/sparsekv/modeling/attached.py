"""What attach() leaves on each attention module: which policy governs it, and the forward it is in."""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sparsekv.cache.state import HeadShape
from sparsekv.dms import NeuronSource
from sparsekv.modeling.lora import Lora
from sparsekv.policies import Policy

ATTACHED = "sparsekv_layer"
"""The attribute of an attention module that holds its AttachedLayer."""
ATTACHMENT = "sparsekv_attachment"
"""The attribute of an attached model that holds its Attachment."""
CALL = threading.local()
"""What the hooks of the attention layer under way in this thread leave for its attention function. hidden: what the
policy decides from, the layer's input [B, S, hidden_size] or, with a neuron source, what it read: the logits
[B, S, kv_heads], or for DMC a packed dmc.BeforeRope; cache: the PagedCache, or None. Not a subclass with these as
fields: what compiled code stores in one is lost."""


@dataclass(kw_only=True)
class AttachedLayer:
    """One attention layer of an attached model."""

    layer: int
    policy: Policy
    attachment: "Attachment"
    neuron: NeuronSource | None = None


class _Columns(CacheLayerMixin):
    """What Transformers asks of a layer: how many columns it has seen. The tokens live in the ragged cache."""

    is_sliding = False

    def __init__(self, cache: "PagedCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """A Cache that attends for itself, in pages: SparseCache, and the engine's. layers: how many the model has."""

    def __init__(self, layers: int) -> None:
        self.columns = 0
        super().__init__(layers=[_Columns(self) for _ in range(layers)])

    @abstractmethod
    def attend(
        self,
        attached: AttachedLayer,
        hidden: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """One layer of a forward. hidden: [B, S, hidden_size]; q: [B, H * G, S, D]; k, v: [B, H, S, D]; mask: bool
        [B, columns + S] or None. Returns [B, S, H * G, D]."""


@dataclass(kw_only=True)
class Attachment:
    """What attach() did to a model, and what detach() undoes."""

    policy: Policy
    kv_heads: int
    group: int
    """Query heads per KV head."""
    head_dim: int
    max_tokens: int
    """The model's context length."""
    layers: list[AttachedLayer] = field(default_factory=list)
    gates: Callable[[int, Tensor], Tensor] | None = None
    """In training: (layer, logits) -> log(1 - alpha), see contexts.soft."""
    keep: float = 0.0
    """The share of a neuron source's channel that attention still sees, while a model is taught to do without it."""
    lora: Lora | None = None
    """What the adapter adds to the weights."""
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """What detach() calls, last first: partials and bound methods, so that a copy of the model has its own."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copied or pickled model, perhaps in a process where nothing was attached yet."""
        from sparsekv.modeling.attention import register  # which imports this module

        self.__dict__.update(state)
        register()

    def head_shape(self, dtype: torch.dtype) -> HeadShape:
        """Of its attention layers, with keys and values of this type."""
        return HeadShape(kv_heads=self.kv_heads, group=self.group, dim=self.head_dim, dtype=dtype)
