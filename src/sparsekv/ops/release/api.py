"""release: give the pages of whole rows back to the free stack, and empty the rows, without asking the device.

A page with several owners loses one; the last owner's page becomes free.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekv.ops.layout import check_backend
from sparsekv.ops.release import reference

BACKENDS = ("reference", "triton")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """All layers of a cache, N of them: what LayerPages shows of one."""

    pages: Tensor
    """int32 [N, R, H, M]."""
    lengths: Tensor
    """int32 [N, R, H]."""
    seen: Tensor
    """int32 [N, R]."""
    free: Tensor
    """int32 [P] or longer."""
    free_count: Tensor
    """int32 [1]."""
    extra_owners: Tensor
    """int32 [P]."""
    page_size: int


def release(tables: Tables, rows: Tensor, *, backend: str | None = None) -> None:
    """Empty rows (int64 [n], distinct; -1 for none) in all layers, in place.

    Without a backend's name, Triton runs on CUDA, the reference elsewhere. The order in which pages come onto the free
    stack may differ between them. State that policies keep of rows and pages is not touched.

    Raises ValueError where the backend asked for is unknown or cannot run.
    """
    if len(rows) == 0:
        return
    if check_backend(backend, rows.device, BACKENDS) == "triton":
        from sparsekv.ops.release import triton

        triton.release(tables, rows)
    else:
        reference.release(tables, rows)
