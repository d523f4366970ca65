"""release in plain PyTorch: the oracle, and the CPU path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsekv.ops.release.api import Tables


def release(tables: Tables, rows: Tensor) -> None:
    """rows: int64 [n], distinct, -1 for none."""
    rows = rows[rows >= 0]
    columns = -(-tables.lengths[:, rows] // tables.page_size)
    owned = torch.arange(tables.pages.shape[-1], device=rows.device) < columns[..., None]
    gone = torch.bincount(tables.pages[:, rows][owned].long(), minlength=len(tables.extra_owners)).int()
    freed = (gone > tables.extra_owners).nonzero()[:, 0].int()
    tables.extra_owners.sub_(gone).clamp_(min=0)
    first = int(tables.free_count)
    tables.free[first : first + len(freed)] = freed
    tables.free_count.add_(len(freed))
    tables.lengths[:, rows] = 0
    tables.seen[:, rows] = 0
