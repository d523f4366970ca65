"""The engine's thread: it alone touches the engine, and does between two steps what others ask for.

Whoever wants something puts a job into its queue and waits for what comes back. So Ctrl-C, which Python raises in the
main thread, never finds the engine half-way through a step: it leaves the wait, and the requests are withdrawn. A step
that fails tells every listener and empties the engine; where that fails too (a lost device), every later call says so.
"""

import asyncio
import atexit
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from sparsekv.engine.engine import Engine
from sparsekv.engine.outputs import RequestOutput
from sparsekv.engine.schedule.request import Request

Sink = Callable[[Request | BaseException], None]
"""Hears of each change of a request, or why there will be none. Runs in the engine's thread, so it must not wait."""
Job = Callable[[], None]
T = TypeVar("T")
Spec = dict[str, Any]
"""The arguments of Engine.add."""
_RUNNING: dict[threading.Thread, "SimpleQueue[Job | None]"] = {}
"""The engines' threads, and what they wait at."""
_LAST_STEP_S = 30.0
"""A process that ends waits so long, at most, for a step under way."""


@dataclass(eq=False)
class Ticket:
    """What one caller has asked for."""

    requests: list[Request] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.requests) and all(request.finished for request in self.requests)


class Streams:
    """An engine that many threads and tasks may use. `close` ends its thread, and so does dropping this object."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sinks: dict[str, Sink] = {}
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._over: str | None = None
        """Why nothing more can be run."""
        arguments = (weakref.ref(self), self._jobs, engine.runner.device)
        self._thread = threading.Thread(target=_serve, args=arguments, name="sparsekv-engine", daemon=True)
        weakref.finalize(self, self._jobs.put, None).atexit = False
        _RUNNING[self._thread] = self._jobs
        self._thread.start()

    # What callers do

    def run(self, specs: list[Spec], ticket: Ticket, *, finished: Callable[[Request], None]) -> None:
        """Run requests, all or none, until they are finished; `finished` hears of each. Leaving early withdraws them.

        Raises ValueError where one of them is refused, and what a failed step raised.
        """
        inbox: SimpleQueue[Request | BaseException] = SimpleQueue()

        def put(event: Request | BaseException) -> None:
            if isinstance(event, BaseException) or event.finished:
                inbox.put(event)

        try:
            self._post(lambda: self._admit(specs, ticket, put))
            for _ in specs:
                event = inbox.get()
                if isinstance(event, BaseException):
                    raise event
                finished(event)
        finally:
            if not ticket.finished:
                self.withdraw(ticket)

    async def stream(self, spec: Spec, *, pace: Callable[[], float]) -> AsyncIterator[RequestOutput]:
        """The outputs of one request as they come; cancels it when the iteration is left. pace: seconds from one to the
        next at least, but for the last. None is made before the one before it was taken."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[RequestOutput | BaseException](maxsize=1)
        ticket, over, taken = Ticket(), asyncio.Event(), threading.Event()
        taken.set()

        def offer(output: RequestOutput | BaseException) -> None:
            if queue.full():  # the last one holds all that the older said
                queue.get_nowait()
            queue.put_nowait(output)
            if isinstance(output, BaseException) or output.finished:
                over.set()

        def put(event: Request | BaseException) -> None:
            if isinstance(event, Request) and not event.finished and not taken.is_set():
                return
            taken.clear()
            output = event.output() if isinstance(event, Request) else event
            loop.call_soon_threadsafe(offer, output)

        try:
            self._post(lambda: self._admit([spec], ticket, put))
            while True:
                output = await queue.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
                if not over.is_set() and (seconds := pace()) > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), seconds)
                taken.set()
        finally:
            if not ticket.finished:
                await asyncio.shield(asyncio.to_thread(self.withdraw, ticket))

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel what is left of a ticket. Its pages are free when this returns."""
        self._do(lambda: self._drop(ticket))

    def abort(self, request_id: str) -> None:
        """Engine.abort. Whoever listens gets the output as it is, finished."""
        self._do(lambda: self._engine.abort(request_id))

    def between_steps(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by the thread while no step runs. Raises what it raises, and ValueError where the
        thread has ended."""
        done: list[T | BaseException] = []

        def keep() -> None:
            try:
                done.append(work())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, the engine is as it was
                done.append(error)

        self._do(keep)
        found = done[0] if done else ValueError(self._over)
        if isinstance(found, BaseException):
            raise found
        return found

    @property
    def alive(self) -> bool:
        """Whether requests can be run: the thread is there, and no failure was too deep to recover from."""
        return self._over is None and self._thread.is_alive()

    def close(self) -> None:
        """End the thread. Requests that are left fail."""
        self._over = self._over or "this LLM is closed; make a new one"
        self._jobs.put(None)
        self._thread.join()
        self.__dict__.pop("_engine", None)

    def _post(self, job: Job) -> None:
        if self._over is None:
            self._jobs.put(job)
        if self._over is not None:  # before, or meanwhile: a job behind the end is never run
            raise ValueError(self._over)

    def _do(self, work: Callable[[], None]) -> None:
        """Have the thread do something and wait until it has, unless the thread has ended."""
        done: SimpleQueue[None] = SimpleQueue()

        def job() -> None:
            self._guard(work)
            done.put(None)

        self._jobs.put(job)
        if self._over is None:
            done.get()

    # What the thread does

    def died(self, error: BaseException) -> None:
        """The thread ends by an error that nothing foresaw: whoever waits, and whoever comes later, must hear of it."""
        self._over = f"this LLM's thread died ({type(error).__name__}); make a new LLM"
        self._recover(ValueError(self._over))
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job()

    def _work(self, job: Job | None) -> bool:
        """A job, then steps until nothing is left to do, and the jobs that come meanwhile. False: this is the end."""
        while job is not None:
            job()
            while self._jobs.empty():
                if not self._engine.has_work:
                    return True
                self._guard(self._step)
            job = self._jobs.get()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job()
        self._recover(ValueError(self._over))
        return False

    def _admit(self, specs: list[Spec], ticket: Ticket, sink: Sink) -> None:
        """Queue requests, all or none."""
        try:
            if self._over is not None:
                raise ValueError(self._over)
            for spec in specs:
                request = self._engine.add(**spec)
                ticket.requests.append(request)
                self._sinks[request.id] = sink
        except ValueError as refusal:
            self._guard(lambda: self._drop(ticket))
            ticket.requests.clear()
            _tell(sink, refusal)
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
            _tell(sink, error)
            self._recover(error)

    def _drop(self, ticket: Ticket) -> None:
        ids = [request.id for request in ticket.requests if not request.finished]
        for request_id in ids:
            self._sinks.pop(request_id, None)
        self._engine.abort(*ids)

    def _step(self) -> None:
        for request in self._engine.step():
            sink = self._sinks.get(request.id)
            if request.finished:
                self._sinks.pop(request.id, None)
            if sink is not None and not _tell(sink, request):
                self._sinks.pop(request.id, None)
                self._engine.abort(request.id)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - every listener must hear of it
            self._recover(error)

    def _recover(self, error: BaseException) -> None:
        """Empty the engine, of which nothing is known now, and tell every listener."""
        sinks, self._sinks = list(self._sinks.values()), {}
        try:
            self._engine.reset()
        except BaseException as lost:  # noqa: BLE001 - the device may raise anything
            self._over = (
                f"this LLM failed ({type(error).__name__}: {error}) and could not be reset "
                f"({type(lost).__name__}); make a new one"
            )
        for sink in sinks:
            _tell(sink, error)


def _tell(sink: Sink, event: Request | BaseException) -> bool:
    """Whether the listener could be told."""
    try:
        sink(event)
    except Exception as error:  # noqa: BLE001 - its text cannot be read, or its event loop is closed
        with suppress(Exception):
            sink(error)
        return False
    return True


def _serve(streams: "weakref.ref[Streams]", jobs: "SimpleQueue[Job | None]", device: torch.device) -> None:
    """The thread. While it waits it keeps nothing alive."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            job, alive = jobs.get(), streams()
            if alive is None:
                gc.collect()  # the pool, now rather than some time: a cache and its layers know each other
                return
            try:
                if not alive._work(job):
                    return
            except BaseException as error:
                alive.died(error)
                raise
            del job, alive
    finally:
        del _RUNNING[threading.current_thread()]


@atexit.register
def _end_threads() -> None:
    """Python stops daemon threads wherever they are, and one that is inside PyTorch then aborts the whole process."""
    running = list(_RUNNING.items())
    for _, jobs in running:
        jobs.put(None)
    for thread, _ in running:
        thread.join(_LAST_STEP_S)
