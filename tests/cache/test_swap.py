"""Swapping a row out and in again changes no bit of it, and frees exactly its own pages."""

import pytest
import torch

from helpers import tokens
from serving import attached, engine, greedy, prompts
from sparsekv import SparseCache
from sparsekv.cache.swap import swap_in, swap_out
from sparsekv.ops.decode.reference import gather_slots


@pytest.mark.parametrize("policy", ["dense", "dms", "streaming"])
def test_round_trip_is_bit_exact(policy: str) -> None:
    """Into another row, after other rows have taken and freed pages; the next tokens' logits are the same bits."""
    model = attached(policy)
    cache = SparseCache(model, page_size=4)
    with torch.no_grad():
        model(tokens(3, 21), past_key_values=cache)
        before = SparseCache(model, page_size=4)
        model(tokens(3, 21), past_key_values=before)
        ragged = cache.ragged
        in_use = ragged.pool.pages_in_use
        swapped = swap_out(ragged, 1)
        assert ragged.pool.pages_in_use == in_use
        ragged.release(torch.tensor([1]))
        assert ragged.pool.pages_in_use == in_use - swapped.pages
        assert swapped.bytes == swapped.pages * ragged.pool.page_bytes
        ragged.release(torch.tensor([0]))  # its pages come back in another order
        swap_in(ragged, 1, swapped)
        again = swap_out(ragged, 1)
        assert torch.equal(again.kv, swapped.kv)
        assert torch.equal(again.lengths, swapped.lengths)
        assert torch.equal(again.seen, swapped.seen)
        for layer in range(2):
            ours, theirs = cache.ragged.layer(layer), before.ragged.layer(layer)
            assert torch.equal(ours.ring[1], theirs.ring[1])
            lengths = theirs.lengths[1].tolist()
            for mine, other in zip(gather_slots(ours, 1, lengths), gather_slots(theirs, 1, lengths), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_policy_s_own_state_goes_along() -> None:
    model = attached("dense")
    cache = SparseCache(model, page_size=4)
    with torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
    ragged = cache.ragged
    ragged.state[1]["weights"] = torch.arange(6.0).reshape(2, 3)
    swapped = swap_out(ragged, 1)
    ragged.release(torch.tensor([1]))
    assert not ragged.state[1]["weights"][1].any()
    swap_in(ragged, 1, swapped)
    assert ragged.state[1]["weights"][1].tolist() == [3.0, 4.0, 5.0]


def test_a_pool_that_is_too_full_says_so_and_stays_as_it_was() -> None:
    llm = engine(attached("dense"), pages=24)
    runner = llm.engine.runner
    llm.engine.add(prompts(16)[0], greedy(8))
    llm.engine.step()
    llm.engine.step()
    swapped = runner.swap_out(0)
    with pytest.raises(ValueError, match="the KV pool is full"):
        runner.swap_in(1, swapped)
    assert runner.ragged.pool.pages_in_use == swapped.pages
    assert not runner.ragged.lengths[:, 1].any()
