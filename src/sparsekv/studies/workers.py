"""Who makes cells: this process, or several that live on from cell to cell, each begun anew (by spawn).

A process in which a cell failed is replaced, since a failed kernel can leave it without its device; one that died takes
no other cell with it.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from queue import LifoQueue
from types import TracebackType
from typing import Self

from transformers.utils.logging import disable_progress_bar

from sparsekv.json_lines import Line

Cell = Callable[[], Sequence[Line]]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A cell's lines, or why there are none."""

    name: str
    seconds: float
    lines: Sequence[Line] = ()
    error: str | None = None
    traceback: str | None = None


class Crew:
    """processes: 1 is this one. A context, at whose end the processes are gone."""

    def __init__(self, processes: int) -> None:
        self._workers = LifoQueue["_Worker"]()  # the last one to be idle first: what it loaded is at hand
        self._threads: ThreadPoolExecutor | None = None
        if processes > 1:
            self._threads = ThreadPoolExecutor(processes)  # which only wait
            for _ in range(processes):
                self._workers.put(_Worker(threads=max(1, (os.cpu_count() or 1) // processes)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        while not self._workers.empty():
            self._workers.get().close()

    def make(self, cells: Mapping[str, Cell], *, until: float) -> Iterator[Made]:
        """As they are made; those not begun at `until`, of time.monotonic, are left out."""
        if self._threads is None:
            yield from (_make(name, cell) for name, cell in cells.items() if time.monotonic() < until)
            return
        futures = [self._threads.submit(self._by_a_worker, *item, until) for item in cells.items()]
        for future in as_completed(futures):
            if (made := future.result()) is not None:
                yield made

    def _by_a_worker(self, name: str, cell: Cell, until: float) -> Made | None:
        if time.monotonic() >= until:
            return None
        worker = self._workers.get()
        try:
            return worker.make(name, cell)
        finally:
            self._workers.put(worker)


class _Worker:
    """One process at a time, started when there is something to do. threads: that PyTorch may use in it."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._process: ProcessPoolExecutor | None = None

    def make(self, name: str, cell: Cell) -> Made:
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")
            self._process = ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(self._threads,))
        begun = time.monotonic()
        try:
            made = self._process.submit(_make, name, cell).result()
        except BrokenProcessPool as error:
            made = Made(name=name, seconds=_since(begun), error=f"its process died: {error}")
        if made.error:
            self.close()
        return made

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()
        self._process = None


def _begin(threads: int) -> None:
    import torch

    disable_progress_bar()
    torch.set_num_threads(threads)


def _make(name: str, cell: Cell) -> Made:
    begun = time.monotonic()
    try:
        return Made(name=name, lines=cell(), seconds=_since(begun))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells are worth having
        told = f"{type(error).__name__}: {error}"
        return Made(name=name, seconds=_since(begun), error=told, traceback=traceback.format_exc())


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)
