"""The pull towards the ratio, by hand, and the original's schedule in terms of ours."""

import pytest
import torch

from sparsekv import dmc, dms


def test_straight_through_is_hard_forward_and_soft_backward():
    alpha = torch.tensor([0.0, 0.4, 0.5, 0.51, 1.0], requires_grad=True)
    hard = dmc.straight_through(alpha)
    hard.sum().backward()
    assert hard.tolist() == pytest.approx([0, 0, 0, 1, 1])
    assert torch.equal(alpha.grad, torch.ones(5))


def test_each_text_is_pulled_on_its_own():
    """Two texts, two layers of four decisions: 6 of 8 merge in the first, 2 of 8 in the second; target 1/2. The first
    is past it and cannot make up for the second: (0 + 1/4) / 2, and only the second has a gradient."""
    one, two = torch.tensor([0.9] * 4), torch.tensor([0.9, 0.9, 0.1, 0.1])
    layers = [torch.stack([one, two]), torch.stack([two, 1 - one])]
    alphas = [x.view(2, 2, 2).requires_grad_() for x in layers]
    loss = dmc.compression_loss(alphas, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.125)
    for alpha in alphas:
        assert not alpha.grad[0].any()
        assert torch.allclose(alpha.grad[1], torch.full((2, 2), -1 / 16))


def test_schedule_is_linear_and_then_held():
    """1 + (4 - 1) min(1, step / 6000), the original's, is ours with one more every 2000 steps."""
    for step in (0, 500, 2000, 6000, 8000):
        ours = dms.compression_ratio(step, steps_per_cr=2000, max_cr=4)
        assert ours == pytest.approx(1 + 3 * min(1, step / 6000))


def test_the_neurons_fade_over_four_fifths_of_the_first_stage():
    kept = [dmc.neuron_keep(step, steps=250) for step in (0, 100, 200, 249)]
    assert kept == [1, 0.5, 0, 0]
