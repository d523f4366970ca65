"""What the tests of bounds share: random pages, and their bounds one page after the other."""

import pytest
import torch
from torch import Tensor

from sparsekv.ops.bounds import refresh
from sparsekv.ops.layout import LayerPages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
LENGTHS = [[0, 37], [16, 5], [8, 9], [33, 64]]
PADDED_ROWS = [2, 0, -1, 3, 1]


def paged(
    lengths: list[list[int]],
    *,
    dim: int = 16,
    page_size: int = 8,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
    seed: int = 0,
) -> LayerPages:
    """Random keys and values in scattered pages, NaN in slots that are not in use. whole: keys are small whole numbers,
    so that every product and sum is exact in float32 and equal bounds are common."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads = len(lengths), len(lengths[0])
    columns = max(map(max, lengths)) // page_size + 2
    pages = torch.randperm(rows * heads * columns, generator=generator).view(rows, heads, columns)
    length = torch.tensor(lengths, dtype=torch.int32)
    kv = torch.randn(pages.numel(), 2, page_size, dim, generator=generator)
    kv = kv.mul(1.5).round() if whole else kv
    unused = torch.arange(columns * page_size).view(columns, page_size) >= length[..., None, None]
    kv.masked_fill_(torch.zeros(len(kv), page_size).bool().index_put((pages,), unused)[:, None, :, None], torch.nan)
    small = {"dtype": torch.int32, "device": DEVICE}
    return LayerPages(
        kv=kv.to(DEVICE, dtype),
        pages=pages.to(**small),
        lengths=length.to(DEVICE),
        ring=torch.zeros(rows, heads, 0, **small),
        seen=torch.arange(100, 100 + rows, **small),
        free=torch.zeros(len(kv), **small),
        free_count=torch.zeros(1, **small),
        tickets=torch.zeros(rows, heads, **small),
    )


def longest(layer: LayerPages) -> int:
    return int(layer.lengths.max())


def unset(layer: LayerPages) -> Tensor:
    """Bounds that nothing was written to."""
    return torch.full((len(layer.kv) + 1, 2, layer.kv.shape[-1]), torch.nan, dtype=layer.kv.dtype, device=DEVICE)


def bounds_of(layer: LayerPages) -> Tensor:
    bounds = unset(layer)
    refresh(layer, torch.arange(len(layer.seen), device=DEVICE), bounds, longest=longest(layer), backend="reference")
    return bounds


def naive_bounds(layer: LayerPages, rows: list[int]) -> Tensor:
    """Page by page."""
    bounds = unset(layer)
    for row in rows:
        for head, length in enumerate(layer.lengths[row].tolist() if row >= 0 else []):
            for first in range(0, length, layer.page_size):
                page = layer.pages[row, head, first // layer.page_size].item()
                keys = layer.kv[page, 0, : length - first]
                bounds[page] = torch.stack([keys.amin(0), keys.amax(0)])
    return bounds
