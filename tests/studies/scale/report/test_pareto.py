"""Fronts and margins: by hand, by closed forms, and what must hold of any."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsekv.studies.scale.report.pareto import Axis, Front, front, margin

shares = st.integers(0, 20).map(lambda n: n / 20)
budgets = st.integers(1, 64).map(float)
points = st.lists(st.tuples(budgets, shares), min_size=1, max_size=12)
axes = st.sampled_from(["linear", "log"])


def made(drawn: list[tuple[float, float]]) -> Front:
    return front(*zip(*drawn, strict=True))


def test_by_hand() -> None:
    """A: 0.2 at 1, 0.6 at 3; B: 0.1 at 2, 0.5 at 4. They share 2 to 3, where A is 0.4 to 0.6 and B 0.1 to 0.3."""
    a, b = front([1, 3, 2], [0.2, 0.6, 0.1]), front([2, 4], [0.1, 0.5])
    assert a.points.tolist() == [0, 1]
    found = margin(a, b)
    assert found.value == pytest.approx(0.3)
    assert found.doublings == pytest.approx(math.log2(1.5))
    assert margin(b, a).value == pytest.approx(-0.3)


def test_a_step_of_the_other_front_inside_the_interval() -> None:
    """B rises by 0.4 from 2 to 3 and A is level: trapezoids by hand, (0.5 * 1 + ... ) over 1 to 4."""
    a, b = front([1, 4], [0.5, 0.5001]), front([1, 2, 3, 4], [0.1, 0.1001, 0.5, 0.5001])
    assert margin(a, b).value == pytest.approx((0.4 + 0.2 + 0.0) / 3, abs=1e-3)


def test_the_log_axis_in_closed_form() -> None:
    """A is linear in log2 of the budget, from 0.1 at 1 to 0.5 at 16; B in the budget itself, seen on the log axis:
    its mean over [1, 16] of 0.1 + 0.4 log2(x) / 4 is 0.3, and B has but its end points, so it is the same line."""
    a = front([1, 2, 4, 8, 16], [0.1, 0.2, 0.3, 0.4, 0.5])
    b = front([1, 16], [0.1, 0.5])
    assert margin(a, b, "log").value == pytest.approx(0.0, abs=1e-12)
    assert margin(a, b, "log").doublings == pytest.approx(4)
    x = np.array([1.0, 2, 4, 8, 16])
    gap = a.accuracy - (0.1 + 0.4 * (x - 1) / 15)
    by_hand = ((gap[1:] + gap[:-1]) / 2 * np.diff(x)).sum() / 15
    assert margin(a, b, "linear").value == pytest.approx(by_hand)


def test_what_gets_nothing_right_is_no_point() -> None:
    found = front([1, 2, 4], [0.0, 0.0, 0.3])
    assert found.points.tolist() == [2]
    assert margin(found, front([1, 8], [0.1, 0.2])).value is None
    assert margin(front([1], [0.0]), found).doublings == 0


@given(points)
def test_no_point_is_better_than_the_front_and_each_of_it_is_a_point(drawn: list[tuple[float, float]]) -> None:
    found = made(drawn)
    assert (np.diff(found.budget) > 0).all()
    assert (np.diff(found.accuracy) > 0).all()
    pairs = {drawn[i] for i in found.points}
    assert pairs == set(zip(found.budget.tolist(), found.accuracy.tolist(), strict=True))
    for x, y in drawn:
        assert y == 0 or found.accuracy[found.budget <= x].max() >= y


@given(points, points, axes)
def test_a_margin_is_odd_and_within_what_accuracies_allow(
    a: list[tuple[float, float]], b: list[tuple[float, float]], axis: Axis
) -> None:
    one, other = made(a), made(b)
    there, back = margin(one, other, axis), margin(other, one, axis)
    assert there.doublings == back.doublings
    assert margin(one, one, axis).value in (None, 0.0)
    if there.value is None:
        assert back.value is None
    else:
        assert back.value == pytest.approx(-there.value)
        assert abs(there.value) <= 1


@given(points, st.integers(1, 5), axes)
def test_a_front_raised_by_d_has_the_margin_d(drawn: list[tuple[float, float]], d: int, axis: Axis) -> None:
    base = made(drawn)
    assume(len(base.budget) > 1)
    raised = front(base.budget, base.accuracy + d / 20)
    assert margin(raised, base, axis).value == pytest.approx(d / 20)


@given(points, points)
def test_the_unit_of_the_budget_does_not_matter(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    one, other = made(a), made(b)
    scaled = [Front(budget=f.budget * 1e3, accuracy=f.accuracy, points=f.points) for f in (one, other)]
    for axis in ("linear", "log"):
        before, after = margin(one, other, axis), margin(*scaled, axis)
        assert (before.value is None) == (after.value is None)
        if before.value is not None:
            assert after.value == pytest.approx(before.value)


@given(points, points, axes)
def test_the_integral_is_that_of_a_fine_grid(
    a: list[tuple[float, float]], b: list[tuple[float, float]], axis: Axis
) -> None:
    one, other = made(a), made(b)
    found = margin(one, other, axis)
    if found.value is None:
        return  # half of all pairs share no stretch
    low, high = max(one.budget[0], other.budget[0]), min(one.budget[-1], other.budget[-1])
    grid = np.geomspace(low, high, 20001) if axis == "log" else np.linspace(low, high, 20001)
    gap = one.at(grid, axis) - other.at(grid, axis)
    assert found.value == pytest.approx(float((gap[1:] + gap[:-1]).mean() / 2), abs=1e-3)
