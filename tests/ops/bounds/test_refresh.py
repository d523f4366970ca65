"""Bounds are the minimum and maximum of what a page holds now: reference and kernel alike, bit for bit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bounding import BACKENDS, DEVICE, LENGTHS, PADDED_ROWS, longest, naive_bounds, paged, unset
from sparsekv.ops.bounds import refresh, refresh_written
from sparsekv.ops.layout import batch_of
from sparsekv.ops.place import place


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.nan_to_num(12345), want.nan_to_num(12345))


@BACKENDS
@pytest.mark.parametrize(
    ("dim", "page_size", "dtype"),
    [(16, 8, torch.float32), (64, 32, torch.bfloat16), (80, 16, torch.float16), (16, 2, torch.float32)],
)
def test_bounds_are_those_of_each_page(backend, dim, page_size, dtype):
    """Bit for bit, of the pages that the rows hold and of no others."""
    layer = paged(LENGTHS, dim=dim, page_size=page_size, dtype=dtype)
    rows, bounds = [2, -1, 3, 0], unset(layer)
    refresh(layer, torch.tensor(rows, device=DEVICE), bounds, longest=longest(layer), backend=backend)
    assert same(bounds, naive_bounds(layer, rows))


@BACKENDS
def test_pages_larger_than_a_tile_of_the_kernel(backend):
    layer = paged([[300, 100]], dim=80, page_size=128)
    bounds = unset(layer)
    refresh(layer, torch.tensor([0], device=DEVICE), bounds, longest=300, backend=backend)
    assert same(bounds, naive_bounds(layer, [0]))


def test_float64_stays_float64():
    layer = paged(LENGTHS, dtype=torch.float64)
    bounds = unset(layer)
    refresh(layer, torch.arange(4, device=DEVICE), bounds, longest=64)
    assert same(bounds, naive_bounds(layer, [0, 1, 2, 3]))


@BACKENDS
@settings(max_examples=8)
@given(data=st.data())
def test_written_page_alone_is_recomputed(backend, data):
    """The page of the slot, of appended and of overwritten ones; none for -1 and for padded rows."""
    layer = paged(LENGTHS)
    rows = torch.tensor(PADDED_ROWS, device=DEVICE)
    slots = [
        [data.draw(st.integers(-1, length - 1)) for length in (LENGTHS[row] if row >= 0 else (4, 4))]
        for row in PADDED_ROWS
    ]
    bounds, want, every = unset(layer), unset(layer), naive_bounds(layer, [0, 1, 2, 3])
    refresh_written(layer, rows, torch.tensor(slots, dtype=torch.int32, device=DEVICE), bounds, backend=backend)
    for row, of_row in zip(PADDED_ROWS, slots, strict=True):
        for head, slot in enumerate(of_row):
            if row >= 0 and slot >= 0:
                page = layer.pages[row, head, slot // layer.page_size].item()
                want[page] = every[page]
    assert same(bounds, want)


@BACKENDS
def test_the_slot_that_the_ring_rule_took(backend):
    """The newest where nothing is overwritten, else the one that the ring names for the last token."""
    layer, rows = paged(LENGTHS), torch.tensor(PADDED_ROWS, device=DEVICE)
    ring = torch.randint(0, 6, (4, 2, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ringed = dataclasses.replace(layer, ring=ring)  # seen is 100 and more
    named = ring[torch.arange(4), :, (layer.seen.long() - 1) % 3] >> 1
    for held, slots in ((layer, layer.lengths - 1), (ringed, named)):
        got, want = unset(layer), unset(layer)
        refresh_written(held, rows, None, got, backend=backend)
        refresh_written(held, rows, slots[rows], want, backend="reference")
        assert same(got, want)
        assert not want.isnan().all()


@BACKENDS
def test_a_slot_that_is_not_held_writes_nothing(backend):
    """Where the pool ran out, the token was not placed."""
    layer = paged([[8, 5]])
    bounds = unset(layer)
    slots = torch.tensor([[8, 200]], dtype=torch.int32, device=DEVICE)
    refresh_written(layer, torch.tensor([0], device=DEVICE), slots, bounds, backend=backend)
    assert bounds.isnan().all()


@BACKENDS
def test_bounds_shrink_when_an_outlier_is_overwritten(backend):
    """Steps as they come: bounds kept up page by page are those computed anew, appended, overwritten or both."""
    layer = paged([[0, 0]], page_size=4)
    layer = dataclasses.replace(
        layer,
        pages=torch.zeros(1, 2, 6, dtype=torch.int32, device=DEVICE),
        kv=layer.kv.new_full((12, 2, 4, 16), torch.nan),
    )
    layer.free.resize_(12).copy_(torch.arange(12))
    layer.free_count.fill_(12)
    bounds, row = unset(layer), torch.tensor([0], device=DEVICE)
    targets = [-1, -1, -1, -1, -1, 2, 4, -1, 0, -1, -1, 3]
    for t, target in enumerate(targets):
        k = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(t)).to(DEVICE) / (1 + t)
        slots = torch.full((1, 2), target, dtype=torch.int32, device=DEVICE)
        written = torch.where(slots < 0, layer.lengths[row], slots)
        place(layer, batch_of(row, [1]), k, k, slots=slots, backend=backend)
        refresh_written(layer, row, written, bounds, backend=backend)
        assert same(bounds, naive_bounds(layer, [0]))
