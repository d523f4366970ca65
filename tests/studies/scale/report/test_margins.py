"""Margins over tables made by hand: what is known of them must come out, with an interval around it."""

from typing import Any

import numpy as np
import pytest

from sparsekv.studies.scale.cells import BUDGETS, Cell, Method
from sparsekv.studies.scale.report.margins import ALL, VOTED, Compared, compare
from sparsekv.studies.scale.report.tables import Chains, Table

CHAINS = Chains(tokens=1, ended=1, ratio=1, bounds=0)


def made(name: str, accuracy: Any, cost: Any, *, task: str = "a", voted: bool = True) -> Table:
    """accuracy [P, W, L]; cost [W, L], the same for every problem and budget."""
    method = Method(name=name, policy="dense" if name == "dense" else "tova", ratios=(1.0,), model="m")
    costs = np.broadcast_to(np.asarray(cost, dtype=float), np.shape(accuracy))
    return Table(
        cell=Cell(method=method, ratio=1.0, task=task, seed=0), voted=voted,
        problems=[f"{task}/{i}" for i in range(len(accuracy))], accuracy=np.asarray(accuracy, dtype=float),
        costs=dict.fromkeys(BUDGETS, costs), chains=CHAINS, about={},
    )  # fmt: skip


def of(found: list[Compared], **wanted: Any) -> Compared:
    (one,) = [c for c in found if all(getattr(c, name) == value for name, value in wanted.items())]
    return one


def test_half_the_cost_for_the_same() -> None:
    """Both go from 0.2 at 1 to 0.6 at 5, the one at half the cost: it is 0.3 at 1.5 and 0.6 at 2.5."""
    rng = np.random.default_rng(0)
    right = (rng.random((200, 1)) < [[0.2, 0.6]]).astype(float)[:, None, :]
    low, high = right.mean(0)[0]
    found = compare([made("dense", right, [[1, 5]]), made("ours", right, [[0.5, 2.5]])], resamples=200)
    one = of(found, method="ours", over="dense", task="a", budget="reads", axis="linear")
    slope = (high - low) / 4
    expected = np.mean([(low + (x - 0.5) * 2 * slope) - (low + (x - 1) * slope) for x in (1, 2.5)])
    assert one.margin == pytest.approx(expected)
    assert one.doublings == pytest.approx(np.log2(2.5))
    assert one.low is not None and one.high is not None and one.margin is not None
    assert 0 < one.low < one.margin < one.high
    back = of(found, method="dense", over="ours", task="a", budget="reads", axis="linear")
    assert back.margin == pytest.approx(-one.margin)
    assert (back.low, back.high) == pytest.approx((-one.high, -one.low))


def test_means_over_tasks_and_over_the_voted_alone() -> None:
    tables = []
    for task, gap, voted in (("a", 0.2, True), ("b", 0.4, False)):
        base = np.full((9, 1, 2), [0.1, 0.3])
        tables += [made("dense", base, [[1, 2]], task=task, voted=voted)]
        tables += [made("ours", base + gap, [[1, 2]], task=task, voted=voted)]
    found = compare(tables, budgets=["reads"], resamples=20)
    wanted = {"method": "ours", "over": "dense", "axis": "log"}
    assert of(found, task=ALL, **wanted).margin == pytest.approx(0.3)
    only = of(found, task=VOTED, **wanted)
    assert (only.margin, only.low, only.high, only.tasks) == pytest.approx((0.2, 0.2, 0.2, 1))


def test_nothing_right_is_no_margin() -> None:
    some, none = np.full((4, 1, 2), 0.5), np.zeros((4, 1, 2))
    found = compare([made("dense", some, [[1, 2]]), made("ours", none, [[1, 2]])], budgets=["reads"], resamples=5)
    assert {c.margin for c in found} == {None}


def test_hardly_ever_right_has_an_interval_too() -> None:
    """Most resamples lack a problem of the two that are right."""
    hardly, most = np.zeros((30, 1, 2)), np.full((30, 1, 2), [0.7, 0.9])
    hardly[7] = hardly[3, 0, 1] = 1
    found = compare([made("dense", hardly, [[1, 2]]), made("ours", most, [[1, 3]])], budgets=["reads"], resamples=200)
    margin = of(found, method="ours", over="dense", task="a", axis="linear")
    assert margin.margin == pytest.approx(0.75 - 0.05)
    assert margin.low is not None and margin.high is not None
    assert margin.low < margin.margin < margin.high <= 0.75


def test_problems_that_one_method_lacks_are_left_out() -> None:
    base = np.array([[[0.2, 0.4]], [[0.2, 0.4]], [[1.0, 1.0]]])
    found = compare([made("dense", base[:2], [[1, 2]]), made("ours", base, [[1, 2]])], budgets=["reads"], resamples=5)
    assert of(found, method="ours", over="dense", task="a", axis="linear").margin == 0
