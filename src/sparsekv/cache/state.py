"""What a policy remembers from step to step: declared beforehand, allocated with the pool and counted in its bytes.

    kind   one for each                  lives and moves with
    row    sequence and layer            the row: forked, swapped and taken back with it, filled anew when it is freed
    slot   slot of a page                the slot's key and value: copied with the page, moved when a head is pruned
    page   physical page                 the page, whoever owns it: shared with it

Each tensor has one place more than there are rows or pages, a spare one: a padded row of a CUDA graph (-1) writes there
and to nothing else. What is free holds `fill`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class State:
    """One tensor of a policy. shape: of one entry."""

    name: str
    kind: Literal["row", "slot", "page"]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0

    def allocate(self, *places: int, device: torch.device) -> Tensor:
        """[*places, *shape], filled."""
        return torch.full((*places, *self.shape), self.fill, dtype=self.dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """Views of one layer's state, by name; R rows, P pages, C slots a page."""

    row: dict[str, Tensor] = field(default_factory=dict)
    """[R + 1, ...]."""
    slot: dict[str, Tensor] = field(default_factory=dict)
    """[P + 1, C, ...], of all layers together: a slot is found through the layer's page table."""
    page: dict[str, Tensor] = field(default_factory=dict)
    """[P + 1, ...], likewise."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What the size of a state may depend on."""

    kv_heads: int
    group: int
    """Query heads per KV head."""
    dim: int
    dtype: torch.dtype
    """Of keys and values."""

    @property
    def wide(self) -> torch.dtype:
        """The type of scores and sums: float32, or float64 for float64 keys."""
        return torch.promote_types(self.dtype, torch.float32)
