"""The rule of delayed eviction, hard and soft."""

import math

import pytest
import torch

from sparsekv import dms


def test_mark_is_a_positive_logit():
    assert dms.marks(torch.tensor([-1.0, 0.0, 1e-6, -math.inf, math.inf])).tolist() == [False, False, True, False, True]


def test_golden_example():
    """design.md, section 2: window 2, A, C and E marked."""
    mark = torch.tensor([True, False, True, False, True, False])
    position = torch.arange(6)
    seen = dms.visible(position[:, None], position, mark, 2)
    names = ["".join("ABCDEF"[k] for k in row.nonzero()[:, 0]) for row in seen]
    assert names == ["A", "AB", "BC", "BCD", "BDE", "BDEF"]


def test_align_moves_decisions_to_the_tokens_they_decide():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert dms.align(x, 0, fill=0) is x
    assert dms.align(x, 1, fill=0).tolist() == [[2, 3, 0], [5, 6, 0]]
    assert dms.align(x > 2, 1, fill=False).tolist() == [[False, True, False], [True, True, False]]


def test_noise_is_logistic():
    """P(z + g > 0) = sigmoid(z)."""
    g = dms.logistic((40_000,), generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert float((0.7 + g > 0).float().mean()) == pytest.approx(float(torch.tensor(0.7).sigmoid()), abs=0.01)
    assert float(g.mean()) == pytest.approx(0, abs=0.03)
    assert float(g.std()) == pytest.approx(math.pi / math.sqrt(3), abs=0.03)
    assert torch.isfinite(dms.logistic((10**6,), generator=None, device=torch.device("cpu"))).all()


def test_log_keep_is_log_of_one_minus_alpha():
    gate = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    assert torch.allclose(dms.log_keep(gate), (1 - gate.sigmoid()).log())
    assert torch.allclose(dms.log_keep(torch.tensor([-1e4, 1e4])), torch.tensor([0.0, -1e4]))


def test_hard_log_keep():
    assert dms.hard_log_keep(torch.tensor([True, False])).tolist() == [-math.inf, 0]
    assert dms.hard_log_keep(torch.tensor([True]), torch.float64).dtype == torch.float64
