"""What the tests of kernels that read pages share: a ragged layer of random keys, and the bound of a kernel's error."""

import torch
from torch import Tensor

from sparsekv.ops.layout import LayerPages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = 3
"""How many times the error of eager attention in the same type the kernel may have, both against float64."""


def paged(
    lengths: list[list[int]], *, dim: int = 16, page_size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LayerPages:
    """A layer whose heads hold random keys and values in scattered pages; NaN in every slot that is not in use."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads = len(lengths), len(lengths[0])
    columns = max(max(max(row) for row in lengths), 1) // page_size + 2
    count = rows * heads * columns
    pages = torch.randperm(count, generator=generator).view(rows, heads, columns).int()
    length = torch.tensor(lengths, dtype=torch.int32)
    kv = torch.randn(count, 2, page_size, dim, generator=generator)
    slot = torch.arange(columns * page_size).view(columns, page_size)
    unused = slot >= length[..., None, None]
    kv[pages[unused.any(-1)].long()] = torch.where(
        unused[unused.any(-1)][:, None, :, None], torch.nan, kv[pages[unused.any(-1)].long()]
    )
    return LayerPages(
        kv=kv.to(DEVICE, dtype),
        pages=pages.to(DEVICE),
        lengths=length.to(DEVICE),
        ring=torch.zeros(rows, heads, 0, dtype=torch.int32, device=DEVICE),
        seen=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        free=torch.zeros(count, dtype=torch.int32, device=DEVICE),
        free_count=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        tickets=torch.zeros(rows, heads, dtype=torch.int32, device=DEVICE),
    )


def within_budget(got: Tensor, eager: Tensor, want: Tensor, lse: Tensor, *, terms: float = 0.0) -> bool:
    """Whether got is at most BUDGET times as far from the exact result as eager is.

    A short sum can be exact by luck: never less is allowed than one rounding of the result in eager's type, and of the
    exponents in float32, which are as large as the log-sum-exp. terms: the size of what is added up, where that may
    cancel.
    """
    known = want > -torch.inf
    if not torch.equal(got > -torch.inf, known) or got.isnan().any():
        return False
    if not known.any():
        return True
    got, eager, want = got[known].double(), eager[known], want[known]
    exponent = lse.where(lse > -torch.inf, 0).abs().max()
    relative = (1 + exponent) * torch.finfo(torch.float32).eps
    rounding = relative.clamp(min=torch.finfo(eager.dtype).eps) * want.abs().max().clamp(min=terms)
    return bool((got - want).abs().max() <= BUDGET * torch.maximum((eager.double() - want).abs().max(), rounding))
