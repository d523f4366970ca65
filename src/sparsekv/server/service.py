"""Who may come in, and the requests that run: the LLM, the queue's bound, the drain.

A request of n samples counts n. What does not fit into the rows and the queue is refused at once with 429, so that what
is let in is served within its deadline.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import RequestOutput, Session
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.request import StopWhen
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.operate.dial import Dial
from sparsekv.server.operate.metrics import Metrics
from sparsekv.server.operate.watch import Watch
from sparsekv.server.prefixes import Prefixes
from sparsekv.server.settings import ServerSettings

PACE, MOST_PACE = 0.0005, 0.05
"""Seconds between two states of a stream, for each sample in the server, and at most: many streams compete with the
engine for Python, and nobody reads so fast."""
WHOLE_PACE = 1.0
"""The same of an answer that is sent whole."""
REMEMBERED = 32
"""Requests whose duration says when to try again."""


class Service:
    """One model, served. dial: None where there is none to turn."""

    def __init__(self, llm: LLM, settings: ServerSettings, *, dial: Dial | None = None) -> None:
        if llm.tokenizer is None:
            raise ValueError("a server needs texts: make the LLM with tokenizer=...")
        self.llm, self.settings, self.dial = llm, settings, dial
        self.watch = Watch(llm) if llm.engine.runner.graphs is None else None
        """None where decode steps cannot be looked into."""
        self.prefixes = Prefixes(llm, limit=settings.prefix_cache)
        self.samples = 0
        """Let in and not finished."""
        self.busy = 0
        """Requests under way that a drain waits for."""
        self.draining = False
        self.started = int(time.time())
        self.metrics = Metrics(self)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def rows(self) -> int:
        return self.llm.engine.runner.ragged.rows

    @property
    def epoch(self) -> int:
        """Turns of the dial so far."""
        return 0 if self.dial is None else self.dial.turned

    @property
    def alive(self) -> bool:
        """Whether the engine can run requests."""
        return self.llm.alive

    @property
    def ready(self) -> bool:
        return self.alive and not self.draining

    @contextmanager
    def admitted(self, samples: int) -> Iterator[None]:
        """Within, so many samples run or wait.

        Raises ApiError: 503 while the server drains or its engine is dead, 429 with Retry-After where the queue is
        full, 400 for more samples than one request may have.
        """
        most = min(self.settings.max_samples, self.rows + self.settings.max_waiting)
        if not self.alive:
            raise ApiError(503, "the engine has failed and takes no request; restart the server", code="engine_dead")
        if self.draining:
            raise ApiError(503, "the server is going down; ask another", code="draining", headers={"Retry-After": "5"})
        if samples > most:
            raise ApiError(
                400, f"{samples} samples in one request and {most} are allowed; lower n or send fewer prompts"
            )
        if self.samples + samples > self.rows + self.settings.max_waiting:
            self.metrics.refused("queue_full")
            wait = self._wait()
            message = f"{self.samples} samples run or wait, which is all that this server holds; try again in {wait} s"
            raise ApiError(429, message, headers={"Retry-After": str(wait)})
        self.samples += samples
        try:
            yield
        finally:
            self.samples -= samples

    def _wait(self) -> int:
        """Seconds until there is room: a mean request's, for each round of rows that waits."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        rounds = max(1.0, self.settings.max_waiting / self.rows)
        return min(60, max(1, math.ceil(mean * rounds / 2)))

    async def stream(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        stop_when: StopWhen | None = None,
        keep: bool = False,
        session: Session | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """LLM.stream, seen by the metrics. ids: the whole prompt, that of a session first; whole: only the last state
        counts. Raises as it does."""
        watch, given = self.metrics.watch(), ids if session is None else ids[len(session.tokens) :]
        options: dict[str, Any] = {"request_id": request_id, "stop_when": stop_when, "keep": keep, "session": session}
        options["pace"] = lambda: WHOLE_PACE if whole else min(MOST_PACE, PACE * self.samples)
        stream: Any = self.llm.stream(given, params, **options)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                watch(output)
                if output.finished:
                    self._seconds.append(time.time() - output.metrics.arrival_time)
                yield output

    async def streams(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        request_id: str,
        stop_when: StopWhen | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Several prompts at once: (which prompt, its newest state), the finished one of each last."""
        newest: dict[int, RequestOutput] = {}
        moved = asyncio.Event()

        async def follow(index: int) -> None:
            name = request_id if len(prompts) == 1 else f"{request_id}-{index}"
            options: dict[str, Any] = {"request_id": name, "stop_when": stop_when, "whole": whole}
            stream = self.stream(prompts[index], params[index], **options)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    newest[index] = output
                    moved.set()

        tasks = [asyncio.create_task(follow(i)) for i in range(len(prompts))]
        for task in tasks:
            task.add_done_callback(lambda _: moved.set())
        try:
            while not all(task.done() for task in tasks) or newest:
                await moved.wait()
                moved.clear()
                for task in tasks:
                    if task.done():
                        task.result()
                while newest:
                    index = next(iter(newest))
                    yield index, newest.pop(index)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
