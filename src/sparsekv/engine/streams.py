"""Who steps the engine: whoever holds the turn. generate steps it in the caller's thread; streams share a thread.

Outputs go to the sink of their request, whichever thread ran the step.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparsekv.engine.engine import Engine
from sparsekv.engine.outputs import RequestOutput
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.request import Request

Sink = Callable[[RequestOutput | Exception], None]


class Turn:
    """A lock that is given in order of asking, so that the stepping thread cannot keep others out."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        mine = threading.Event()
        with self._guard:
            self._queue.append(mine)
            if len(self._queue) == 1:
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                self._queue.popleft()
                if self._queue:
                    self._queue[0].set()


class Streams:
    """An engine that several threads use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = Turn()
        self._sinks: dict[str, Sink] = {}
        self._work = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, ids: list[int], params: SamplingParams, *, sink: Sink | None = None, **options: Any) -> Request:
        """Engine.add, with where the outputs go."""
        with self._turn():
            request = self._engine.add(ids, params, **options)
            if sink is not None:
                self._sinks[request.id] = sink
            return request

    def abort(self, request_id: str) -> None:
        """Engine.abort; the sink hears nothing more."""
        with self._turn():
            self._sinks.pop(request_id, None)
            self._engine.abort(request_id)

    def run(self, ids: list[str]) -> list[RequestOutput]:
        """Step until these requests are finished; their outputs in order."""
        done: dict[str, RequestOutput] = {}

        def keep(output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                raise output
            done[output.request_id] = output

        with self._turn():
            self._sinks |= dict.fromkeys(ids, keep)
        while not all(i in done and done[i].finished for i in ids):
            with self._turn():
                self._step()
        return [done[i] for i in ids]

    async def stream(self, ids: list[int], params: SamplingParams, **options: Any) -> AsyncIterator[RequestOutput]:
        """The outputs of one request as they come; cancels it when the iteration is left."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[RequestOutput | Exception]()

        def put(output: RequestOutput | Exception) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, output)

        request = await asyncio.to_thread(self.add, ids, params, sink=put, **options)
        try:
            self._wake()
            while True:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            if not request.finished:
                await asyncio.shield(asyncio.to_thread(self.abort, request.id))

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="sparsekv-engine", daemon=True)
            self._thread.start()
        self._work.set()

    def _loop(self) -> None:
        while True:
            self._work.wait()
            with self._turn():
                if not self._engine.has_work:
                    self._work.clear()
                    continue
                try:
                    self._step()
                except Exception as error:  # noqa: BLE001 - every stream must hear of it
                    for sink in self._sinks.values():
                        sink(error)
                    self._sinks.clear()
                    return

    def _step(self) -> None:
        for output in self._engine.step():
            sink = self._sinks.get(output.request_id)
            if sink is not None:
                if output.finished:
                    del self._sinks[output.request_id]
                sink(output)
