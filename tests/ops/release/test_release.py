"""release gives back what nobody else owns, whatever is held and shared, and never asks the device anything."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import check_pages
from paging import DEVICE
from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.layout import Batch, batch_of
from sparsekv.ops.place import place
from sparsekv.ops.release import release, triton

BACKENDS = ["reference", "triton"]
ROWS, HEADS, LAYERS = 4, 2, 3


def filled(counts: list[int], *, pages: int = 400, seed: int = 0) -> RaggedCache:
    """Rows of so many tokens, of which heads have forgotten some."""
    pool = PagePool(pages, page_size=4, head_dim=8, dtype=torch.float32, device=DEVICE)
    cache = RaggedCache(pool, [3] * LAYERS, kv_heads=HEADS, rows=ROWS, max_tokens=2048)
    generator = torch.Generator().manual_seed(seed)
    batch = batch_of(torch.arange(len(counts), device=DEVICE), counts)
    for layer in range(LAYERS):
        k, v = torch.randn(2, sum(counts), HEADS, 8, generator=generator).to(DEVICE)
        marks = (torch.rand(sum(counts), HEADS, generator=generator) < 0.5).to(DEVICE)
        place(cache.layer(layer), batch, k, v, marks=marks, backend="reference")
    return cache


def owners(cache: RaggedCache) -> Counter[int]:
    """How many heads own each page, counted from the tables."""
    rows = torch.arange(ROWS, device=DEVICE)
    return Counter(cache.pages[cache.owned(rows)].tolist())


def free(cache: RaggedCache) -> set[int]:
    pages = cache.pool.free[: cache.pool.pages_free].tolist()
    assert len(set(pages)) == len(pages)
    return set(pages)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    counts=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    fork=st.booleans(),
    rows=st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS),
)
def test_pages_that_nobody_else_owns_are_free(backend, counts, fork, rows):
    cache = filled(counts)
    if fork:
        cache.fork(torch.tensor([1], device=DEVICE), torch.tensor([3], device=DEVICE))
    kept = [row for row in range(ROWS) if row not in rows]
    lengths, seen = cache.lengths[:, kept].clone(), cache.seen[:, kept].clone()
    release(cache.tables(), torch.tensor([*rows, -1, -1], device=DEVICE), backend=backend)
    left = owners(cache)
    assert not cache.lengths[:, rows].any() and not cache.seen[:, rows].any()
    assert torch.equal(cache.lengths[:, kept], lengths) and torch.equal(cache.seen[:, kept], seen)
    assert free(cache) == set(range(cache.pool.pages)) - set(left)
    assert {page: n for page, n in enumerate(cache.pool.extra_owners.tolist()) if n} == {
        page: n - 1 for page, n in left.items() if n > 1
    }
    check_pages(cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_owners_of_a_page_at_once(backend):
    cache = filled([30, 30, 30])
    cache.fork(torch.tensor([1], device=DEVICE), torch.tensor([3], device=DEVICE))
    assert int(cache.pool.extra_owners.sum()) > 0
    release(cache.tables(), torch.tensor([3, 1], device=DEVICE), backend=backend)
    check_pages(cache)
    release(cache.tables(), torch.tensor([0, 2], device=DEVICE), backend=backend)
    assert cache.pool.pages_free == 400 and not cache.lengths.any() and not cache.seen.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_more_pages_than_a_tile(backend):
    cache = filled([1500], pages=LAYERS * HEADS * 400)
    assert int(cache.lengths.max()) > 4 * triton.TILE / 2
    release(cache.tables(), torch.tensor([0], device=DEVICE), backend=backend)
    check_pages(cache)
    assert cache.pool.pages_in_use == 0


def test_the_host_asks_the_device_nothing(monkeypatch):
    cache, rows = filled([9, 30, 2]), torch.tensor([1, -1], device=DEVICE)

    def refuse(*args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__index__", "__float__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    if DEVICE == "cpu":  # what the interpreter itself does to run a kernel
        monkeypatch.setattr(Tensor, "cpu", lambda self: self)
    release(cache.tables(), rows, backend="triton")
    monkeypatch.undo()
    check_pages(cache)


def test_released_pages_serve_the_next_row():
    cache = filled([9, 30, 2])
    release(cache.tables(), torch.tensor([1], device=DEVICE), backend="triton")
    batch = Batch(
        rows=torch.tensor([1], device=DEVICE),
        starts=torch.tensor([0, 50], dtype=torch.int32, device=DEVICE),
        longest=50,
    )
    k, v = torch.randn(2, 50, HEADS, 8, device=DEVICE)
    place(cache.layer(0), batch, k, v, backend="triton")
    assert cache.seen[0].tolist() == [9, 50, 2, 0]
    check_pages(cache)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        release(filled([1]).tables(), torch.tensor([0], device=DEVICE), backend="cuda")
