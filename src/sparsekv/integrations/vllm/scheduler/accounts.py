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

AHEAD = 3
"""Numbers of tokens, from those that were scheduled on, whose needs are worked out at once for all rows."""
NEVER = np.iinfo(np.int64).max
"""The first step of a row that is nobody's."""

Table = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker's rows held at the end of a step."""

    step: int
    table: Table
    """int32 [rows, 2 + C]: tokens seen, pages, and the number of heads by length modulo C."""


@dataclass(kw_only=True)
class _Account:
    """A request that has a row."""

    row: int
    credits: list[Any] = field(default_factory=list)


class Accounts:
    """heads: pages of a credit, at least the layers times KV heads of any worker; rows: requests at once; workers: how
    many report.

    Hundreds of requests ask at every step, so what is asked of all is worked out for all rows at once, as a report
    comes.
    """

    def __init__(self, *, heads: int, page_size: int, rows: int, workers: int) -> None:
        self.heads = heads
        self.page_size = page_size
        self.workers = workers
        self.step = 0
        """The last step that was given to the workers."""
        self._free_rows = list(range(rows - 1, -1, -1))
        self._released = dict.fromkeys(range(rows))
        self._accounts: dict[str, _Account] = {}
        self._rest = -np.arange(page_size) % page_size
        """Slots that are free in a head's last page, by its length modulo the page size; and the other way round."""
        # By row.
        self._owners: list[_Account | None] = [None] * rows
        self._first_steps = np.full(rows, NEVER)
        """The first step in which the row is its request's."""
        self._scheduled = [0] * rows
        """Tokens once all that was scheduled has run."""
        self._needs: list[tuple[int, list[int]]] = [(0, [])] * rows
        """Tokens that were scheduled at the last report; credits for so many, and for 1, 2 ... more."""
        # By worker and row, as last reported; measured: since the row is its request's.
        self._last_report = [0] * workers
        self._measured = np.zeros((workers, rows), dtype=bool)
        self._tables = np.zeros((workers, rows, 2 + page_size), dtype=np.int32)
        self._bounds = np.zeros((workers, rows, page_size + 1), dtype=np.int64)
        """Pages with 0, 1 ... C tokens more."""

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, request: str) -> bool:
        """Whether it has a row."""
        return request in self._accounts

    def bound(self, request: str, tokens: int) -> int:
        """The most pages of any worker that a request can have taken with `tokens` tokens."""
        account = self._accounts.get(request)
        if account is None or not self._measured[:, account.row].all():
            return self.heads * -(-tokens // self.page_size)
        return int(self._most(np.array([account.row]), np.array([[tokens]]))[0, 0])

    def needs(self, request: str, tokens: int) -> int:
        """Credits for the bound."""
        account = self._accounts.get(request)
        if account is not None:
            first, known = self._needs[account.row]
            if 0 <= tokens - first < len(known):
                return known[tokens - first]
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
        self._accounts[request] = self._owners[row] = _Account(row=row)
        self._first_steps[row] = self.step + 1
        self._scheduled[row], self._needs[row] = 0, (0, [])
        return row

    def schedule(self, request: str, tokens: int, credits: list[Any]) -> None:
        """The request will have `tokens` tokens after the next step. credits: as many as it lacked, now its own."""
        account = self._accounts[request]
        account.credits.extend(credits)
        self._scheduled[account.row] = tokens = max(self._scheduled[account.row], tokens)
        assert len(account.credits) >= self.needs(request, tokens), "a request runs without enough credits"

    def leave(self, request: str) -> list[Any]:
        """The request is over, or will start again: its credits are free, and its row is once the workers know. Empty
        for a request that never had a row."""
        account = self._accounts.pop(request, None)
        if account is None:
            return []
        self._released[account.row] = None
        self._free_rows.append(account.row)
        self._owners[account.row] = None
        self._first_steps[account.row] = NEVER
        self._measured[:, account.row] = False
        return account.credits

    def next_step(self) -> tuple[int, list[int]]:
        """The number of the step that goes to the workers now, and the rows that they must empty before it."""
        self.step += 1
        released, self._released = list(self._released), {}
        return self.step, released

    def settle(self, worker: int, report: Report) -> list[Any]:
        """Take in what a worker reported, in any order; returns the credits that requests no longer need."""
        if report.step <= self._last_report[worker]:
            return []
        self._last_report[worker] = report.step
        rows = np.flatnonzero(self._first_steps <= report.step)
        table = report.table[rows]
        self._tables[worker, rows] = table
        self._bounds[worker, rows, 0] = table[:, 1]
        self._bounds[worker, rows, 1:] = table[:, 1:2] + table[:, 2 + self._rest].cumsum(1)
        self._measured[worker, rows] = True
        if self.workers > 1:
            rows = rows[self._measured[:, rows].all(0)]
        where = rows.tolist()
        scheduled = [self._scheduled[row] for row in where]
        bounds = self._most(rows, np.array(scheduled, dtype=np.int64)[:, None] + np.arange(AHEAD))
        surplus: list[Any] = []
        for row, first, known in zip(where, scheduled, (-(-bounds // self.heads)).tolist(), strict=True):
            self._needs[row] = first, known
            account = self._owners[row]
            assert account is not None
            if len(account.credits) > known[0]:
                surplus += account.credits[known[0] :]
                del account.credits[known[0] :]
        return surplus

    def totals(self) -> dict[str, float]:
        """What running requests had at the last report: tokens seen, tokens held (averaged over all heads), pages of
        the fullest worker; and the credits that they hold."""
        rows = np.flatnonzero(self._measured.any(0))
        measured, tables = self._measured[:, rows], self._tables[:, rows]
        seen, pages, hist = tables[..., 0], tables[..., 1], tables[..., 2:]
        slots = pages * self.page_size - hist @ self._rest
        heads = np.where(measured, hist.sum(-1), 0).sum(0)
        held = np.where(measured, slots, 0).sum(0) / np.maximum(heads, 1)
        return {
            "requests": len(self._accounts),
            "tokens_seen": int(np.where(measured, seen, 0).max(0).sum()),
            "tokens_held": float(held.sum()),
            "pages": int(np.where(measured, pages, 0).max(0).sum()),
            "credits": sum(len(account.credits) for account in self._accounts.values()),
        }

    def _most(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The bounds of rows [n] that all workers have measured, with each of tokens [n, k]: [n, k]."""
        whole, rest = np.divmod(np.maximum(tokens - self._tables[:, rows, :1], 0), self.page_size)
        bounds = self._bounds[:, rows]
        heads = bounds[..., -1:] - bounds[..., :1]  # each takes one page in so many tokens as a page has
        return (np.take_along_axis(bounds, rest, axis=2) + whole * heads).max(0)
