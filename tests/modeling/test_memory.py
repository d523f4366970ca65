"""Never faked: after 4,000 tokens at ratio 4 the pool holds what the statistics say, and nobody holds the rest."""

import gc

import pytest
import torch

import sparsekv
from helpers import check_pages, random_heads, tiny_model, tokens
from sparsekv import SparseCache

LENGTH, WINDOW, PAGE = 4000, 32, 16


@pytest.fixture(scope="module")
def filled():
    """A cache after 4,000 tokens at ratio 4, and the bytes of every live tensor before and after."""
    model = tiny_model(max_position_embeddings=4096)
    sparsekv.attach(model, policy="dms", window=WINDOW)
    random_heads(model)
    policy = sparsekv.modeling.attach.attachment_of(model).policy
    low, high = -5.0, 5.0
    for _ in range(8):  # more evicted, other hidden states, other marks: search
        policy.offset = (low + high) / 2
        ratio = sparsekv.inspect(model, tokens(1, 1000)).stats.compression_ratio
        low, high = (policy.offset, high) if ratio < 3.8 else (low, policy.offset)
    cache = SparseCache(model, kv_memory="4MiB", page_size=PAGE)
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)  # the pool exists from here on
        cache.reset()
        gc.collect()
        before = live_bytes()
        for part in tokens(1, LENGTH).split([3000, 990, *[1] * 10], dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
    gc.collect()
    return cache, before, live_bytes()


def live_bytes() -> dict[int, int]:
    """Storage address -> bytes, of every tensor that Python still reaches."""
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # compilers leave fakes
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}


def test_the_pool_holds_what_the_statistics_say_page_for_page(filled):
    cache = filled[0]
    stats, ragged = cache.stats(), cache.ragged
    assert stats.tokens_seen == LENGTH
    assert 3 < stats.compression_ratio < 5
    held = [[sum(1 for _ in slots(ragged, layer, head)) for head in range(2)] for layer in range(2)]
    assert stats.held == held
    pages = sum(-(-n // PAGE) for layer in held for n in layer)
    assert stats.pages == ragged.pool.pages - ragged.pool.pages_free == pages
    assert stats.bytes == pages * 2 * PAGE * 8 * 4
    assert stats.tokens_held == stats.peak_tokens == sum(map(sum, held)) / 4
    check_pages(ragged)


def slots(ragged, layer, head):
    """The distinct places (page, offset) of one head, none of them a free page."""
    free = set(ragged.pool.free[: ragged.pool.pages_free].tolist())
    table = ragged.pages[layer, 0, head].tolist()
    places = [(table[i // PAGE], i % PAGE) for i in range(int(ragged.lengths[layer, 0, head]))]
    assert len(set(places)) == len(places)
    assert not free & {page for page, _ in places}
    return places


def test_no_tensor_of_dense_size_stays_alive(filled):
    """All that was allocated since the pool: the index, and nothing that grows with the tokens evicted."""
    cache, before, after = filled
    new = {address: size for address, size in after.items() if address not in before}
    dense_layer = 2 * LENGTH * 2 * 8 * 4  # keys and values of one layer, dense
    assert max(new.values()) < dense_layer / 4
    assert sum(new.values()) < cache.ragged.index_bytes() + dense_layer / 4


def test_a_pool_too_small_for_dense_is_enough(filled):
    """The pool is what is allocated, and the dense cache would not fit a third of it."""
    stats = filled[0].stats()
    assert stats.bytes + stats.index_bytes < 2 * 2 * LENGTH * 2 * 8 * 4 / 2.5  # both layers, keys and values
