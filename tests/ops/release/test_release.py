"""release equals the cache's own release, whatever is held and shared, and never asks the device anything."""

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


def same(one: RaggedCache, other: RaggedCache) -> bool:
    """All but the order of free pages."""
    count = one.pool.pages_free
    return (
        torch.equal(one.lengths, other.lengths)
        and torch.equal(one.seen, other.seen)
        and count == other.pool.pages_free
        and torch.equal(one.pool.free[:count].sort().values, other.pool.free[:count].sort().values)
        and torch.equal(one.pool.extra_owners, other.pool.extra_owners)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    counts=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    fork=st.booleans(),
    rows=st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS),
)
def test_it_is_the_caches_own_release(backend, counts, fork, rows):
    caches = [filled(counts), filled(counts)]
    for cache in caches:
        if fork:
            cache.fork(torch.tensor([1], device=DEVICE), torch.tensor([3], device=DEVICE))
    chosen = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    caches[0].release(chosen)
    padded = torch.cat([chosen, torch.full((2,), -1, dtype=torch.int64, device=DEVICE)])
    release(caches[1].tables(), padded, backend=backend)
    assert same(*caches)
    check_pages(caches[1])


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
