"""Decisions from keys, importances from queries."""

import pytest
import torch

from sparsekv import dmc


def test_each_kv_heads_key_decides_for_itself():
    key = torch.arange(12.0).view(1, 3, 4)
    assert dmc.merge_logits(key).tolist() == [[-2, 2, 6]]
    assert dmc.merge_logits(key, channel=0, scale=2, offset=1).tolist() == [[1, 9, 17]]
    assert dmc.merge_logits(key.bfloat16()).dtype == torch.float32


def test_importance_is_of_the_groups_mean():
    """Four query heads in two groups, head size 2: the last channels 1, 3 and -9, -1."""
    query = torch.tensor([[[7.0, 1], [7, 3], [7, -9], [7, -1]]])
    wanted = torch.tensor([[7.0, 0.0]]).sigmoid()
    torch.testing.assert_close(dmc.importance(query, 2), wanted)
    torch.testing.assert_close(dmc.importance(query, 2, scale=0.5, offset=1), torch.tensor([[2.0, -1.5]]).sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_never_zero(dtype):
    w = dmc.importance(torch.full((1, 2, 4), -1e4, dtype=dtype), 2)
    assert w.dtype == torch.float32
    assert (w >= torch.finfo(dtype).eps).all()


def test_at_the_start_nothing_merges_and_all_weigh_the_same():
    zeroed = dmc.zero_neuron_(torch.randn(5, 4, 8))
    assert torch.equal(dmc.merge_logits(zeroed), torch.full((5, 4), -5.0))
    torch.testing.assert_close(dmc.importance(zeroed, 2), torch.tensor(5.0).sigmoid().expand(5, 2))


def test_every_head_loses_the_channel():
    states = torch.randn(3, 4, 8)
    before = states.clone()
    assert dmc.zero_neuron_(states, keep=0.25) is states
    assert torch.equal(states[..., :-1], before[..., :-1])
    assert torch.equal(states[..., -1], before[..., -1] * 0.25)
    dmc.zero_neuron_(states)
    assert not states[..., -1].any()
