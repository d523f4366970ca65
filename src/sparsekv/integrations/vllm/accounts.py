"""The scheduler's account of pages that workers took, in vLLM's blocks. No torch, no vLLM.

A block is a *credit*: one page for every layer and KV head of a worker. A request must hold credits for at least the
pages that its heads can have taken once all that was scheduled has run. Workers report late, or not at all, so that is
a bound: with `pages` measured after `seen` tokens, and `hist[r]` heads whose length is r modulo the page size C,

    bound(tokens) = pages + sum over r of hist[r] * (ceil((r + t) / C) - ceil(r / C)),    t = tokens - seen

which is exact where every head appends every token. Before a worker's first report it is dense. Each worker has its own
heads and pages: the largest bound counts.

A request's *row* is its place in the workers' tables. A row that a request leaves is named to the workers in the next
step, before anything else in that step; and all rows are in the first, since a worker may have warmed up in them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEAR = 4
"""Tokens ahead of a report for which bounds are worked out at once for all rows."""

Table = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker's rows held at the end of a step."""

    step: int
    table: Table
    """int32 [rows, 2 + C]: tokens seen, pages, and the number of heads by length modulo C."""


@dataclass(kw_only=True)
class _Measured:
    """A worker's last word about a request."""

    seen: int
    pages: int
    slots: int
    """In use, over all heads."""
    heads: int
    hist: Table
    near: list[int]
    """Pages that 0, 1 ... NEAR tokens more can take."""


@dataclass(kw_only=True)
class _Account:
    """A request that has a row."""

    row: int
    first_step: int
    """The first step in which the row is this request's."""
    scheduled: int = 0
    """Tokens once all that was scheduled has run."""
    credits: list[Any] = field(default_factory=list)
    measured: dict[int, _Measured] = field(default_factory=dict)
    """By worker."""


class Accounts:
    """heads: pages of a credit, at least the layers times KV heads of any worker; rows: requests at once; workers: how
    many report."""

    def __init__(self, *, heads: int, page_size: int, rows: int, workers: int) -> None:
        self.heads = heads
        self.page_size = page_size
        self.workers = workers
        self.step = 0
        """The last step that was given to the workers."""
        self._free_rows = list(range(rows - 1, -1, -1))
        self._released = dict.fromkeys(range(rows))
        self._accounts: dict[str, _Account] = {}
        self._last_report: dict[int, int] = {}
        residue = np.arange(page_size, dtype=np.int64)
        self._residue = residue
        self._near = np.stack([self._growth(t) for t in range(NEAR + 1)], axis=1)
        self._rest = np.where(residue > 0, page_size - residue, 0)
        """Slots that are not in use of a head's last page."""

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, request: str) -> bool:
        """Whether it has a row."""
        return request in self._accounts

    def bound(self, request: str, tokens: int) -> int:
        """The most pages of any worker that a request can have taken with `tokens` tokens."""
        account = self._accounts.get(request)
        dense = self.heads * -(-tokens // self.page_size)
        if account is None or len(account.measured) < self.workers:
            return dense
        return max(self._bound(measured, tokens) for measured in account.measured.values())

    def needs(self, request: str, tokens: int) -> int:
        """Credits for the bound."""
        return -(-self.bound(request, tokens) // self.heads)

    def lacks(self, request: str, tokens: int) -> int | None:
        """Credits that a request must be given before it may have `tokens` tokens; None where no row is left for it."""
        account = self._accounts.get(request)
        if account is None and not self._free_rows:
            return None
        return max(0, self.needs(request, tokens) - (len(account.credits) if account else 0))

    def enter(self, request: str) -> int:
        """Give a new request a row, which it returns."""
        assert request not in self._accounts
        row = self._free_rows.pop()
        self._accounts[request] = _Account(row=row, first_step=self.step + 1)
        return row

    def schedule(self, request: str, tokens: int, credits: list[Any]) -> None:
        """The request will have `tokens` tokens after the next step. credits: as many as it lacked, now its own."""
        account = self._accounts[request]
        account.credits.extend(credits)
        account.scheduled = max(account.scheduled, tokens)
        assert len(account.credits) >= self.needs(request, account.scheduled), "a request runs without enough credits"

    def leave(self, request: str) -> list[Any]:
        """The request is over, or will start again: its credits are free, and its row is once the workers know. Empty
        for a request that never had a row."""
        account = self._accounts.pop(request, None)
        if account is None:
            return []
        self._released[account.row] = None
        self._free_rows.append(account.row)
        return account.credits

    def next_step(self) -> tuple[int, list[int]]:
        """The number of the step that goes to the workers now, and the rows that they must empty before it."""
        self.step += 1
        released, self._released = list(self._released), {}
        return self.step, released

    def settle(self, worker: int, report: Report) -> list[Any]:
        """Take in what a worker reported, in any order; returns the credits that requests no longer need."""
        if report.step <= self._last_report.get(worker, 0):
            return []
        self._last_report[worker] = report.step
        counts, hist = report.table[:, :2].tolist(), report.table[:, 2:]
        near, rest, heads = (hist @ self._near).tolist(), (hist @ self._rest).tolist(), int(hist[0].sum())
        surplus: list[Any] = []
        for request, account in self._accounts.items():
            if report.step < account.first_step:
                continue
            row = account.row
            seen, pages = counts[row]
            slots = pages * self.page_size - rest[row]
            account.measured[worker] = _Measured(
                seen=seen, pages=pages, slots=slots, heads=heads, hist=hist[row], near=near[row]
            )
            need = self.needs(request, account.scheduled)
            surplus += account.credits[need:]
            del account.credits[need:]
        return surplus

    def totals(self) -> dict[str, float]:
        """What running requests had at the last report: tokens seen, tokens held (averaged over all heads), pages of
        the fullest worker; and the credits that they hold."""
        seen = held = pages = credits = 0
        for account in self._accounts.values():
            measured = account.measured.values()
            if measured:
                seen += max(m.seen for m in measured)
                pages += max(m.pages for m in measured)
                held += sum(m.slots for m in measured) / sum(m.heads for m in measured)
            credits += len(account.credits)
        return {
            "requests": len(self._accounts),
            "tokens_seen": seen,
            "tokens_held": held,
            "pages": pages,
            "credits": credits,
        }

    def _bound(self, measured: _Measured, tokens: int) -> int:
        more = max(0, tokens - measured.seen)
        if more <= NEAR:
            return measured.pages + measured.near[more]
        return measured.pages + int(measured.hist @ self._growth(more))

    def _growth(self, tokens: int) -> NDArray[np.int64]:
        """int64 [C]: pages that a head of each length modulo C takes at most in so many tokens more."""
        size = self.page_size
        return -(-(self._residue + tokens) // size) - (self._residue > 0)
