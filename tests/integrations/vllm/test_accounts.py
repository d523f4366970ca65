"""The account is an upper bound of what workers hold, whatever they report and when; credits and rows are conserved."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsekv.integrations.vllm.scheduler.accounts import Accounts, Report

SIZE, ROWS = 4, 3


class Worker:
    """A worker's rows: the length of each head, which grows by at most the tokens that a step places. vLLM warms up in
    them, so that they are not empty at first."""

    def __init__(self, heads: int, pages: int, seed: int) -> None:
        self.lengths = np.ones((ROWS, heads), dtype=np.int64)
        self.seen = np.ones(ROWS, dtype=np.int64)
        self.pages = pages
        self.rng = np.random.default_rng(seed)
        self.queue: list[tuple[int, list[int], dict[int, int]]] = []
        self.reports: list[Report] = []

    def run_oldest(self) -> None:
        step, released, tokens = self.queue.pop(0)
        self.lengths[released] = 0
        self.seen[released] = 0
        for row, count in tokens.items():
            # A window first takes all, then heads differ; anything from 0 to `count` is a worker's right.
            self.lengths[row] += self.rng.integers(0, count, size=self.lengths.shape[1], endpoint=True)
            self.seen[row] += count
        assert self.used() <= self.pages, "a worker ran out of pages"
        table = np.zeros((ROWS, 2 + SIZE), dtype=np.int32)
        table[:, 0] = self.seen
        table[:, 1] = self.row_pages()
        for row in range(ROWS):
            table[row, 2:] = np.bincount(self.lengths[row] % SIZE, minlength=SIZE)
        self.reports.append(Report(step=step, table=table))

    def row_pages(self) -> Any:
        return (-(-self.lengths // SIZE)).sum(1)

    def used(self) -> int:
        return int(self.row_pages().sum())


class Serving(RuleBasedStateMachine):
    """A scheduler of single decisions over workers that run and report whenever the machine says."""

    @initialize(
        heads=st.lists(st.integers(1, 3), min_size=1, max_size=3), blocks=st.integers(3, 12), seed=st.integers(0, 999)
    )
    def start(self, heads: list[int], blocks: int, seed: int) -> None:
        """The largest worker sets what a credit is; others, such as a shorter pipeline stage, have heads to spare."""
        most = max(heads)
        self.workers = [Worker(h, blocks * most, seed + i) for i, h in enumerate(heads)]
        self.accounts = Accounts(heads=most, page_size=SIZE, rows=ROWS, workers=len(heads))
        self.free = list(range(blocks))
        self.blocks = blocks
        self.tokens: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.planned: dict[str, int] = {}
        self.names = 0

    def _schedule(self, name: str, count: int) -> None:
        total = self.tokens[name] + count
        lacking = self.accounts.lacks(name, total)
        if lacking is None or lacking > len(self.free):
            return
        if name not in self.rows:
            self.rows[name] = self.accounts.enter(name)
            assert sorted(self.rows.values()) == sorted(set(self.rows.values())), "a row was given twice"
        given, self.free = self.free[:lacking], self.free[lacking:]
        self.accounts.schedule(name, total, given)
        self.planned[name] = self.planned.get(name, 0) + count
        self.tokens[name] = total

    @rule(count=st.integers(1, 20))
    def arrive(self, count: int) -> None:
        name = f"request {self.names}"
        self.names += 1
        self.tokens[name] = 0
        self._schedule(name, count)
        if name not in self.rows:
            del self.tokens[name]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.sampled_from([1, 1, 1, SIZE, 2 * SIZE + 1]))
    def go_on(self, data: st.DataObject, count: int) -> None:
        self._schedule(data.draw(st.sampled_from(sorted(self.rows))), count)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Finished, aborted or preempted, in whatever step it is."""
        name = data.draw(st.sampled_from(sorted(self.rows)))
        self.free += self.accounts.leave(name)
        assert self.accounts.leave(name) == []
        self.planned.pop(name, None)
        del self.rows[name], self.tokens[name]

    @rule()
    def send_step(self) -> None:
        step, released = self.accounts.next_step()
        assert len(set(released)) == len(released)
        tokens = {self.rows[name]: count for name, count in self.planned.items()}
        self.planned = {}
        for worker in self.workers:
            worker.queue.append((step, released, tokens))

    @rule(data=st.data())
    def run_a_step(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        if worker.queue:
            worker.run_oldest()

    @rule(data=st.data(), lost=st.booleans())
    def report(self, data: st.DataObject, lost: bool) -> None:
        """Any of a worker's reports arrives, also an old one after a newer one; or is lost."""
        index = data.draw(st.integers(0, len(self.workers) - 1))
        reports = self.workers[index].reports
        if reports:
            found = reports.pop(data.draw(st.integers(0, len(reports) - 1)))
            if not lost:
                self.free += self.accounts.settle(index, found)

    @invariant()
    def credits_are_conserved(self) -> None:
        held = self.accounts.totals()["credits"]
        assert len(self.free) == len(set(self.free))
        assert len(self.free) + held == self.blocks

    @invariant()
    def the_bound_holds(self) -> None:
        """Also once all that is in flight has run."""
        for name, row in self.rows.items():
            for worker in self.workers:
                named = [*(released for _, released, _ in worker.queue), self.accounts._released]  # the next step's
                left = any(row in released for released in named)
                if not left:  # else the row holds an older request's pages still
                    assert worker.row_pages()[row] <= self.accounts.bound(name, self.tokens[name])

    def teardown(self) -> None:
        """Nothing is left at the end."""
        for name in list(self.rows):
            self.free += self.accounts.leave(name)
        self.planned, self.rows = {}, {}
        self.send_step()
        for worker in self.workers:
            while worker.queue:
                worker.run_oldest()
            assert worker.used() == 0
        assert sorted(self.free) == list(range(self.blocks))
        assert len(self.accounts) == 0


Serving.TestCase.settings = settings(
    max_examples=40, stateful_step_count=50, suppress_health_check=[HealthCheck.filter_too_much]
)
TestServing = Serving.TestCase


def table_of(*lengths: int, seen: int) -> Any:
    table = np.zeros((ROWS, 2 + SIZE), dtype=np.int32)
    table[:, 2] = len(lengths)  # heads of empty rows
    table[0] = [seen, sum(-(-n // SIZE) for n in lengths), *np.bincount(np.array(lengths) % SIZE, minlength=SIZE)]
    return table


@pytest.mark.parametrize("more", [0, 1, SIZE - 1, SIZE, SIZE + 1, 50])
def test_the_bound_is_exact_where_every_head_appends(more):
    lengths = [1, 4, 7, 8]
    accounts = Accounts(heads=4, page_size=SIZE, rows=ROWS, workers=1)
    assert accounts.enter("a") == 0
    accounts.schedule("a", 10, list(range(3)))
    accounts.next_step()
    accounts.settle(0, Report(step=1, table=table_of(*lengths, seen=10)))
    assert accounts.bound("a", 10 + more) == sum(-(-(n + more) // SIZE) for n in lengths)


def test_it_is_dense_until_every_worker_has_reported():
    accounts = Accounts(heads=2, page_size=SIZE, rows=ROWS, workers=2)
    accounts.enter("a")
    accounts.schedule("a", 12, list("abc"))
    accounts.next_step()
    small = Report(step=1, table=table_of(4, 4, seen=12))
    assert accounts.settle(0, small) == [] and accounts.bound("a", 12) == 6
    assert accounts.settle(1, small) == ["b", "c"] and accounts.bound("a", 12) == 2


def test_what_is_in_flight_keeps_its_credits():
    accounts = Accounts(heads=1, page_size=SIZE, rows=ROWS, workers=1)
    accounts.enter("a")
    accounts.schedule("a", 8, [1, 2])
    accounts.next_step()
    accounts.schedule("a", 16, [3, 4])
    accounts.next_step()
    assert accounts.settle(0, Report(step=1, table=table_of(2, seen=8))) == [4]  # 2 held, up to 8 more under way
    assert accounts.bound("a", 16) == 3


def test_a_report_of_the_rows_last_owner_is_not_believed():
    accounts = Accounts(heads=1, page_size=SIZE, rows=1, workers=1)
    accounts.enter("old")
    accounts.schedule("old", 4, [1])
    accounts.next_step()
    assert accounts.leave("old") == [1]
    assert accounts.lacks("new", 12) == 3
    accounts.enter("new")
    accounts.schedule("new", 12, [1, 2, 3])
    assert accounts.lacks("third", 1) is None
    assert accounts.settle(0, Report(step=1, table=table_of(4, seen=4)[:1])) == []
    assert accounts.bound("new", 12) == 3
    assert accounts.next_step() == (2, [0])


def test_totals_say_what_is_held():
    accounts = Accounts(heads=4, page_size=SIZE, rows=ROWS, workers=2)
    accounts.enter("a")
    accounts.schedule("a", 12, list("abc"))
    accounts.next_step()
    accounts.settle(0, Report(step=1, table=table_of(1, 4, 7, 8, seen=12)))
    accounts.settle(1, Report(step=1, table=table_of(0, 12, seen=12)))
    want = {"requests": 1, "tokens_seen": 12, "tokens_held": 32 / 6, "pages": 6, "credits": 2}
    assert accounts.totals() == want
