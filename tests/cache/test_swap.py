"""Swapping a row out and in again changes no bit of it, and frees exactly its own pages."""

import pytest
import torch

import sparsekv
from helpers import tiny_model, tokens
from serving import attached
from sparsekv import SparseCache
from sparsekv.cache.swap import swap_in, swap_out
from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import held_slots


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
    model = tiny_model()
    sparsekv.attach(model, policy="h2o", budget=6)
    cache = SparseCache(model, page_size=4)
    with torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
        model(tokens(2, 1), past_key_values=cache)
    ragged, row = cache.ragged, torch.tensor([1])

    def remembered() -> list[torch.Tensor]:
        at = [held_slots(ragged.layer(layer), row, 6)[0] for layer in range(2)]
        return [x.flatten()[slots] for slots in at for x in ragged.pool.slot_state.values()]

    before, swapped = remembered(), swap_out(ragged, 1)
    assert set(swapped.pool_state) == {"born", "weight"}
    ragged.release(row)
    free = ragged.pool.free[: ragged.pool.pages_free].long()
    assert not ragged.pool.slot_state["weight"][free].any()
    swap_in(ragged, 1, swapped)
    assert all(torch.equal(a, b) for a, b in zip(before, remembered(), strict=True))
