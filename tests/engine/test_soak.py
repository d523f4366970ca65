"""Random requests for a long time, from several threads and tasks, under interrupts, aborts and failed steps: the right
tokens, zero pages in use at the end, memory that does not grow, no thread left."""

import asyncio
import gc
import random
import signal
import threading
import time
from functools import cache
from typing import Any

import psutil
import pytest

from serving import alone, assert_empty, attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.outputs import RequestOutput

PROMPTS = prompts(3, 11, 24, 1, 17, 33, 8, 40)
NEW = 12


class Fault(BaseException):
    """What the device raises, now and then."""


@cache
def _model() -> Any:
    return attached("dms")


@cache
def _greedy(which: int) -> list[int]:
    return alone(_model(), PROMPTS[which], NEW)


@cache
def _sampled(which: int) -> list[list[int]]:
    """Four samples from an engine that runs nothing else."""
    with engine(_model(), max_num_seqs=8) as llm:
        (output,) = llm.generate(PROMPTS[which], _params(random.Random(0), sampled=True, n=4, new=NEW))
    return [c.token_ids for c in output.outputs]


def _params(rng: random.Random, *, sampled: bool, n: int, new: int) -> SamplingParams:
    options: dict[str, Any] = {"n": n, "max_tokens": new, "logprobs": rng.choice([None, None, 2])}
    if sampled:
        return SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.5, seed=5, **options)
    return SamplingParams(temperature=0.0, **options)


class _User:
    """Asks for some requests at a time, in one of several ways, and checks what comes."""

    def __init__(self, llm: LLM, *, seed: int, requests: int) -> None:
        self.llm, self.rng, self.left, self.wrong = llm, random.Random(seed), requests, list[str]()
        self.failed = 0
        self.interruptible = False

    def run(self, *, streams: bool = True) -> None:
        while self.left > 0:
            many = [self._draw() for _ in range(min(self.left, self.rng.randint(1, 5)))]
            self.left -= len(many)
            try:
                try:
                    self.interruptible = True
                    (self._streams if streams and self.rng.random() < 0.4 else self._generate)(many)
                finally:
                    self.interruptible = False
            except (Fault, KeyboardInterrupt):
                self.failed += 1
            except BaseException as error:  # noqa: BLE001 - told to the test
                self.wrong.append(repr(error))

    def interrupt(self, *_: Any) -> None:
        """What a signal does: raises where the main thread is, once, if it is in a call."""
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt

    def _draw(self) -> tuple[list[int], SamplingParams, list[list[int]]]:
        which, sampled, n = self.rng.randrange(len(PROMPTS)), self.rng.random() < 0.4, self.rng.choice([1, 1, 1, 2, 4])
        new = self.rng.randint(1, NEW)
        expected = _sampled(which)[:n] if sampled else [_greedy(which)] * n
        params = _params(self.rng, sampled=sampled, n=n, new=new)
        return PROMPTS[which], params, [tokens[:new] for tokens in expected]

    def _check(self, output: RequestOutput, expected: list[list[int]]) -> None:
        for c, tokens in zip(output.outputs, expected, strict=True):
            whole = c.token_ids == tokens if c.finish_reason == "length" else c.token_ids == tokens[: len(c.token_ids)]
            if not whole or c.finish_reason not in ("length", "abort"):
                self.wrong.append(f"{c.token_ids} ({c.finish_reason}) for {tokens}")

    def _generate(self, many: list[Any]) -> None:
        outputs = self.llm.generate([m[0] for m in many], [m[1] for m in many])
        for output, (_, _, expected) in zip(outputs, many, strict=True):
            self._check(output, expected)

    def _streams(self, many: list[Any]) -> None:
        leave = self.rng.random() < 0.3

        async def follow(prompt: list[int], params: SamplingParams, expected: list[list[int]]) -> None:
            stream = self.llm.stream(prompt, params)
            async for output in stream:
                if output.finished:
                    self._check(output, expected)
                elif leave and len(output.outputs[0].token_ids) > 4:
                    break
            await stream.aclose()

        async def everything() -> list[Any]:
            return await asyncio.gather(*(follow(*m) for m in many), return_exceptions=True)

        for error in asyncio.run(everything()):
            if isinstance(error, BaseException) and not isinstance(error, Fault):
                self.wrong.append(repr(error))


def _unreliable(llm: LLM, rng: random.Random) -> None:
    """A device that fails now and then, before or after the step."""
    execute = llm.engine.runner.execute

    def failing(step: Any) -> Any:
        chance = rng.random()
        if chance < 0.01:
            raise Fault
        pending = execute(step)
        if chance < 0.02:
            raise Fault
        return pending

    llm.engine.runner.execute = failing  # type: ignore[method-assign]


def _soak(requests: int, *, seed: int, ahead: bool) -> None:
    rng, process, memory, objects = random.Random(seed), psutil.Process(), [], []
    expected = [
        (_greedy(which), _sampled(which)) for which in range(len(PROMPTS))
    ]  # now: one user of a model at a time
    assert all(expected)
    before = threading.active_count()
    llm = engine(_model(), pages=200, max_num_seqs=6, max_num_batched_tokens=24, async_scheduling=ahead)
    _unreliable(llm, rng)
    users = [_User(llm, seed=seed + i, requests=requests // 4) for i in range(4)]
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(rng.uniform(0.01, 0.15)):
            if rng.random() < 0.5:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            ids = list(llm.engine.requests)
            if ids:
                llm.abort(rng.choice(ids))
            if len(memory) <= 4 * (1 - sum(user.left for user in users) / requests):
                gc.collect()
                memory.append(process.memory_info().rss)
                objects.append(len(gc.get_objects()))

    threads = [threading.Thread(target=user.run) for user in users[1:]] + [threading.Thread(target=disturb)]
    previous = signal.signal(signal.SIGUSR1, users[0].interrupt)
    try:
        for thread in threads:
            thread.start()
        users[0].run(streams=False)
        for thread in threads[:-1]:
            thread.join()
    finally:
        over.set()
        threads[-1].join()
        signal.signal(signal.SIGUSR1, previous)
    assert [user.wrong for user in users] == [[]] * 4
    assert any(user.failed for user in users)
    deadline = time.monotonic() + 60
    while llm.engine.has_work and time.monotonic() < deadline:  # what two interrupts at once left behind
        time.sleep(0.01)
    assert_empty(llm)
    assert memory[-1] - memory[0] < 64 << 20
    assert objects[-1] - objects[0] < 5000
    llm.close()
    assert threading.active_count() <= before


def test_two_hundred_requests_in_steps_that_wait() -> None:
    _soak(200, seed=0, ahead=False)


@pytest.mark.slow
def test_two_thousand_requests_in_steps_ahead() -> None:
    _soak(2000, seed=1, ahead=True)
