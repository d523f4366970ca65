"""The ragged cache under any sequence of steps, forks, selections and releases."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import Run, check_pages
from sparsekv.cache.prune import prune
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy


class Ragged(RuleBasedStateMachine):
    """Each row must hold what its own history of logits says, whatever happens to the others."""

    @initialize(window=st.integers(1, 5), lag=st.integers(0, 1), size=st.integers(1, 4), pages=st.integers(30, 300))
    def start(self, window, lag, size, pages):
        policy = DMSPolicy([lambda hidden: hidden], window=window, lag=lag)
        self.run = Run(policy=policy, rows=3, page_size=size, pages=pages, max_tokens=4)
        self.history = [torch.empty(0, 2) for _ in range(3)]
        self.generator = torch.Generator().manual_seed(0)

    @rule(counts=st.lists(st.integers(0, 6), min_size=5, max_size=5))
    def step(self, counts):
        counts = counts[: len(self.history)]
        hidden = torch.randn(sum(counts), 2, generator=self.generator)
        self.run.cache.grow(max(len(h) + n for h, n in zip(self.history, counts, strict=True)))
        query = torch.zeros(len(hidden), 2, 2).double()
        if sum(counts) * 2 <= self.run.cache.pool.pages_free:
            self.run.step(counts, hidden=hidden, query=query)
            parts = hidden.split(counts)
            self.history = [torch.cat([h, new]) for h, new in zip(self.history, parts, strict=True)]

    @rule()
    def decode(self):
        self.step([1] * len(self.history))

    @rule(indices=st.lists(st.integers(0, 99), min_size=1, max_size=5))
    def select(self, indices):
        indices = [i % len(self.history) for i in indices]
        try:
            self.run.executor.select(torch.tensor(indices))
        except ValueError as error:
            assert "the KV pool is full" in str(error)  # noqa: PT017
            return
        self.history = [self.history[i] for i in indices]

    @rule(row=st.integers(0, 99))
    def release(self, row):
        row %= len(self.history)
        self.run.cache.release(torch.tensor([row]))
        self.history[row] = torch.empty(0, 2)

    @precondition(lambda self: hasattr(self, "run"))
    @invariant()
    def every_row_holds_its_own(self):
        window, lag = self.run.policy.window(0), self.run.policy.lag
        assert self.run.cache.rows == len(self.history)
        for row, z in enumerate(self.history):
            n = len(z)
            for head in range(2):
                kept = [k for k in range(n) if n - k <= window or k + lag >= n or z[k + lag, head] <= 0]
                assert self.run.held(row, head) == kept
        check_pages(self.run.cache)


TestRagged = Ragged.TestCase
TestRagged.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def dense_run(length: int, **options) -> Run:
    run = Run(policy=Policy(), **options)
    run.step([length] * run.rows, hidden=torch.zeros(length, 1), query=torch.zeros(length * run.rows, 2, 2).double())
    return run


def test_a_permutation_copies_nothing():
    run = dense_run(5, rows=2, pages=12)
    run.executor.select(torch.tensor([1, 0]))
    assert run.cache.pool.pages_free == 0
    check_pages(run.cache)


def test_forks_share_settled_pages_only():
    """5 tokens in pages of 2: two full pages are shared, the third is copied; per head, and two heads."""
    run = dense_run(5)
    run.executor.select(torch.tensor([0, 0, 0]))
    assert run.cache.pool.pages_in_use == 2 * (2 + 3)
    run.cache.release(torch.tensor([0]))
    assert run.cache.pool.pages_in_use == 2 * (2 + 2)
    run.cache.clear()
    assert run.cache.pool.pages_in_use == 0
    check_pages(run.cache)


def test_a_token_not_yet_decided_is_not_shared():
    """Where marks lag, one fork may overwrite the newest token that the other keeps."""
    run = Run(policy=DMSPolicy([lambda hidden: hidden], window=1, lag=1), page_size=1)
    run.step([3], hidden=-torch.ones(3, 2), query=torch.zeros(3, 2, 2).double())
    run.executor.select(torch.tensor([0, 0]))
    run.step([1, 1], hidden=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), query=torch.zeros(2, 2, 2).double())
    assert run.held(0) == [0, 1, 3]
    assert run.held(1) == [0, 1, 2, 3]
    check_pages(run.cache)


def test_a_selection_that_does_not_fit_changes_nothing():
    run = dense_run(5, pages=7)
    with pytest.raises(ValueError, match=r"\(2 pages\) are needed and 64 B of 448 B are free"):
        run.executor.select(torch.tensor([0, 0]))
    assert run.cache.rows == 1
    assert run.held() == [0.0, 1, 2, 3, 4]
    check_pages(run.cache)


def test_prune_keeps_the_named_slots_and_frees_the_rest():
    run = dense_run(7)
    keep = torch.zeros(1, 2, 7, dtype=torch.bool)
    keep[0, 0, [0, 3, 6]] = True
    run.cache.rewrites = [True]
    prune(run.cache, 0, torch.tensor([0]), keep)
    assert run.held(head=0) == [0.0, 3, 6]
    assert run.held(head=1) == []
    assert run.cache.pool.pages_in_use == 2
    check_pages(run.cache)


def test_page_tables_grow_without_losing_anything():
    run = dense_run(5, max_tokens=5)
    width = run.cache.pages.shape[-1]
    run.cache.grow(6)
    assert run.cache.pages.shape[-1] == width  # 6 slots fit the three pages
    run.cache.grow(7)
    assert run.cache.pages.shape[-1] == 2 * width
    assert run.held() == [0.0, 1, 2, 3, 4]
    sizes = [t.numel() for t in (run.cache.pages, run.cache.lengths, run.cache.seen, *run.cache.rings)]
    assert run.cache.index_bytes() == 4 * sum(sizes)
