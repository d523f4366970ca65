"""Losses and the schedule by hand-computed numbers."""

import math

import pytest
import torch

from sparsekv import dms

# Over two outcomes: teacher (3/4, 1/4), student (1/2, 1/2).
TEACHER = torch.tensor([[math.log(3.0), 0.0]])
STUDENT = torch.tensor([[7.0, 7.0]])
TEACHER_STUDENT = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # sum p log(p / q) = 0.1308
STUDENT_TEACHER = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)  # sum q log(q / p) = 0.1438


def test_divergences_are_named_by_argument_order():
    assert float(dms.kl_teacher_student(TEACHER, STUDENT)) == pytest.approx(TEACHER_STUDENT, abs=1e-6)
    assert float(dms.kl_student_teacher(TEACHER, STUDENT)) == pytest.approx(STUDENT_TEACHER, abs=1e-6)


@pytest.mark.parametrize("kl", [dms.kl_teacher_student, dms.kl_student_teacher])
def test_divergence_is_zero_for_equals_and_per_token_in_float32(kl):
    logits = torch.randn(2, 3, 11)
    assert torch.allclose(kl(logits, logits + 5), torch.zeros(2, 3), atol=1e-6)
    assert kl(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
    assert float(kl(torch.tensor([200.0, -200.0]), torch.tensor([-200.0, 200.0]))) == pytest.approx(400)


def test_hinge_pulls_one_way():
    fraction = torch.tensor([0.5, 0.75, 0.9], requires_grad=True)
    loss = dms.hinge(fraction, 0.75)
    loss.sum().backward()
    assert loss.tolist() == [0.25, 0.0, 0.0]
    assert fraction.grad[0] == -1
    assert fraction.grad[2] == 0


def test_hinge_sum_is_over_all_decisions():
    """Ten decisions of which four are marked and 7.5 wanted: 3.5, and a gradient of 1 to each decision."""
    alpha = torch.tensor([1.0] * 4 + [0.0] * 6, requires_grad=True)
    loss = dms.hinge_sum(alpha.mean(), 0.75, 10)
    loss.backward()
    assert float(loss) == pytest.approx(3.5)
    assert torch.allclose(alpha.grad, torch.full((10,), -1.0))


def test_bernoulli_kl_by_hand():
    """KL(Bernoulli(3/4) || Bernoulli(1/2)) = 3/4 log(3/2) + 1/4 log(1/2)."""
    assert float(dms.bernoulli_kl(torch.tensor(0.5), 0.75)) == pytest.approx(TEACHER_STUDENT, abs=1e-6)
    assert float(dms.bernoulli_kl(torch.tensor(0.75), 0.75)) == pytest.approx(0, abs=1e-6)
    assert float(dms.bernoulli_kl(torch.tensor(0.5), 0.0)) == pytest.approx(math.log(2), abs=1e-6)
    assert torch.isfinite(dms.bernoulli_kl(torch.tensor([0.0, 1.0]), 0.5)).all()


@pytest.mark.parametrize(("step", "ratio"), [(0, 1), (50, 1.5), (100, 2), (300, 4), (700, 8), (701, 8), (9999, 8)])
def test_schedule(step, ratio):
    assert dms.compression_ratio(step, steps_per_cr=100, max_cr=8) == ratio


def test_target_fraction():
    assert [dms.target_fraction(cr) for cr in (1, 2, 4, 8)] == [0, 0.5, 0.75, 0.875]
