"""The two sources of eviction logits."""

import torch

from sparsekv import dms


def test_new_heads_mark_nothing():
    head = dms.EvictionHead(6, 2)
    z = head(torch.randn(3, 5, 6))
    assert z.shape == (3, 5, 2)
    assert torch.equal(z, torch.full((3, 5, 2), -5.0))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"weight": (2, 6), "bias": (2,)}


def test_linear_logits_by_hand():
    z = dms.linear_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0], [0.5, 0.5]]), torch.tensor([0.25, -2]))
    assert z.tolist() == [[1.25, -0.5]]


def test_logits_are_float32_whatever_the_model_is():
    """In bfloat16, -5 + 0.01 is -5: the mark would depend on rounding."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    z = dms.linear_logits(hidden, torch.tensor([[0.01]]), torch.tensor([-5.0]))
    assert z.dtype == torch.float32
    assert float(z) == float(torch.tensor(0.01) - 5)
    assert dms.neuron_logits(torch.ones(1, 2, 4, dtype=torch.bfloat16), 2).dtype == torch.float32


def test_neuron_logits_read_the_first_query_head_of_each_group():
    query = torch.arange(2 * 6 * 4.0).view(2, 6, 4)  # 2 tokens, 6 query heads in 2 groups, head size 4
    z = dms.neuron_logits(query, 2, channel=-1, scale=10, offset=-1)
    assert z.tolist() == [[29.0, 149.0], [269.0, 389.0]]  # 10 * q[t, {0, 3}, 3] - 1
