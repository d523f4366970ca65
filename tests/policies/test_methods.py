"""Each method equals its list implementation (tests/oracles): outputs, every slot, reads; in batches, in any chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from oracles import Dense, random_inputs
from policies.driving import DIM, GROUP, HEADS, LAYER, Driven, agree
from sparsekv.ops.noise import uniform
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.h2o import H2OPolicy
from sparsekv.policies.quest import DMSQuestPolicy, QuestPolicy
from sparsekv.policies.random import RandomPolicy
from sparsekv.policies.snapkv import SnapKVPolicy
from sparsekv.policies.streaming import StreamingPolicy
from sparsekv.policies.tova import TOVAPolicy

ROWS = 2


def drawn(*keys: int) -> float:
    return float(uniform(*(torch.tensor(key) for key in keys)))


@dataclass(frozen=True, kw_only=True)
class Method:
    policy: Callable[[int], Policy]
    oracle: Callable[..., Dense]
    budgets: tuple[int, int] = (2, 9)
    marks: bool = False
    in_order: bool = True
    """Whether slots agree one by one. Prefill stores what DMS keeps compactly, single steps in their order."""
    page_size: int = 2


def dms(window: int, lag: int, **options: Any) -> DMSPolicy:
    kind = DMSQuestPolicy if options else DMSPolicy
    return kind([lambda hidden: hidden] * 3, window=window, lag=lag, **options)


METHODS = {
    "dense": Method(policy=lambda n: Policy(), oracle=lambda n, **o: oracles.Dense(**o)),
    "streaming": Method(
        policy=lambda n: StreamingPolicy(budget=n),
        oracle=lambda n, **o: oracles.Streaming(budget=n, **o),
        budgets=(5, 12),
        in_order=False,
    ),
    "tova": Method(
        policy=lambda n: TOVAPolicy(budget=n), oracle=lambda n, **o: oracles.TOVA(budget=n, **o), budgets=(1, 9)
    ),
    "h2o": Method(
        policy=lambda n: H2OPolicy(budget=n), oracle=lambda n, **o: oracles.H2O(budget=n, **o), budgets=(1, 9)
    ),
    "random": Method(
        policy=lambda n: RandomPolicy(budget=n, seed=5),
        oracle=lambda n, **o: oracles.Random(budget=n, seed=5, uniform=drawn, **o),
        budgets=(2, 12),
    ),
    "snapkv": Method(
        policy=lambda n: SnapKVPolicy(budget=n),
        oracle=lambda n, **o: oracles.SnapKV(budget=n, **o),
        budgets=(33, 40),
    ),
    "quest": Method(
        policy=lambda n: QuestPolicy(budget=n, page_size=2),
        oracle=lambda n, **o: oracles.Quest(budget=n, page=2, **o),
    ),
    "dms": Method(
        policy=lambda n: dms(n, 0), oracle=lambda n, **o: oracles.DMS(window=n, **o), marks=True, in_order=False
    ),
    "dms of lag 1": Method(
        policy=lambda n: dms(n, 1), oracle=lambda n, **o: oracles.DMS(window=n, lag=1, **o), marks=True, in_order=False
    ),
    "dms, immediate": Method(
        policy=lambda n: dms(n, n), oracle=lambda n, **o: oracles.DMS(window=n, lag=n, **o), marks=True, in_order=False
    ),
}
LONG = ("snapkv",)


@st.composite
def sessions(draw: Any, prompts: tuple[int, int]) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompt tokens of each row by turn, decoded tokens by turn, and where the chunks of each prompt end."""
    turns = draw(st.integers(1, 3))
    counts = [[draw(st.integers(*prompts)) for _ in range(ROWS)] for _ in range(turns)]
    decoded = [draw(st.integers(0, 8)) for _ in range(turns)]
    cuts = [sorted(draw(st.sets(st.integers(1, max(c) - 1), max_size=3))) for c in counts]
    return counts, decoded, cuts


@pytest.mark.parametrize("name", METHODS)
def test_method_equals_its_list_implementation(name: str) -> None:
    method = METHODS[name]

    @settings(max_examples=25)
    @given(sessions((2, 14) if name not in LONG else (20, 44)), st.integers(*method.budgets), st.integers(0, 2**16))
    def check(session: tuple, budget: int, seed: int) -> None:
        follow(method, session, budget, seed)

    check()


def follow(method: Method, session: tuple, budget: int, seed: int) -> Driven:
    """Drive policy and oracles side by side; everything must agree all the way."""
    prompts, decoded, cuts = session
    totals = [sum(turn[row] for turn in prompts) + sum(decoded) for row in range(ROWS)]
    qkv = [random_inputs(seed + row, totals[row], heads=HEADS, group=GROUP, dim=DIM) for row in range(ROWS)]
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(total, HEADS, generator=generator) for total in totals]
    inputs = [(*x, h) for x, h in zip(qkv, hidden, strict=True)]
    driven = Driven(policy=method.policy(budget), inputs=inputs, page_size=method.page_size)
    models = [method.oracle(budget, heads=HEADS, group=GROUP, layer=LAYER) for _ in range(ROWS)]

    def extra(row: int, at: Any) -> dict[str, Any]:
        return {"marks": hidden[row][at] > 0} if method.marks else {}

    for turn, counts in enumerate(prompts):
        start = list(driven.placed)
        outs = driven.prompt(counts, cuts[turn])
        for row, model in enumerate(models):
            at = slice(start[row], start[row] + counts[row])
            expected = model.prompt(*(x[at] for x in qkv[row]), **extra(row, at))
            torch.testing.assert_close(outs[row], expected)
            agree(driven, model, row, in_order=method.in_order)
        for _ in range(decoded[turn]):
            at = list(driven.placed)
            before = [(driven.reads(row), driven.bounds(row)) for row in range(ROWS)]
            outs = driven.run([1] * ROWS)
            for row, model in enumerate(models):
                expected = model.decode(*(x[at[row]] for x in qkv[row]), **extra(row, at[row]))
                torch.testing.assert_close(outs[row][0], expected)
                agree(driven, model, row, in_order=method.in_order)
                read = [new - old for new, old in zip(driven.reads(row), before[row][0], strict=True)]
                assert read == model.reads[-1]
                if hasattr(model, "bound_reads"):
                    looked = [new - old for new, old in zip(driven.bounds(row), before[row][1], strict=True)]
                    assert looked == model.bound_reads[-1]
    return driven
