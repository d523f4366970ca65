"""Interrupts, aborts and failed steps: whoever waits is told, and the next call is right."""

import asyncio
import gc
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sparsekv.engine
from serving import alone, assert_empty, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.outputs import RequestOutput

PROMPTS = prompts(5, 23, 11, 2, 17, 8)
NEW = 9
HOME = str(Path(sparsekv.engine.__file__).parent)


SEEDS = range(10)


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """Also where the process was started with the signal ignored, as shells start what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Injected(BaseException):
    """Not an Exception: nothing may mistake it for its own."""


@cache
def _expected(policy: str) -> tuple[Any, list[list[int]]]:
    model = attached(policy)
    return model, [alone(model, prompt, NEW) for prompt in PROMPTS]


def _threads() -> int:
    return sum(thread.name == "sparsekv-engine" for thread in threading.enumerate())


def _settled_threads() -> int:
    """The same, once what other tests left is gone."""
    gc.collect()
    time.sleep(0.3)
    return _threads()


def _tracer(at: int, *, skip: tuple[str, ...] = ()) -> Any:
    """Raises Injected at the `at`-th line of the engine's code."""
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if not name.startswith(HOME) or name.endswith(skip):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Injected
        return trace

    return trace


def _lines(run: Any, install: Any, **options: Any) -> int:
    """How many lines a run has."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(HOME) or name.endswith(options.get("skip", ())):
            return None
        count += event == "line"
        return trace

    install(trace)
    try:
        run()
    finally:
        install(None)
    return count


def _right(llm: LLM, expected: list[list[int]]) -> None:
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy(NEW))] == expected
    assert_empty(llm)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_interrupt_at_any_line_of_the_caller(seed: int) -> None:
    """What Ctrl-C does: it raises in the thread that called generate, at any of its lines."""
    rng = random.Random(seed)
    model, expected = _expected("dms")
    llm = _LLMS.setdefault("caller", engine(model, async_scheduling=True))
    lines = _LINES.setdefault("caller", _lines(lambda: llm.generate(PROMPTS, greedy(NEW)), sys.settrace))
    params = [greedy(NEW, n=rng.choice([1, 1, 3])) for _ in PROMPTS]
    sys.settrace(_tracer(rng.randint(1, lines)))
    try:
        llm.generate(PROMPTS, params)
    except Injected:
        assert all(
            o.outputs[0].token_ids == e[: len(o.outputs[0].token_ids)]
            for o, e in zip(llm.partial, expected, strict=False)
        )
    finally:
        sys.settrace(None)
    _right(llm, expected)


_LLMS: dict[str, LLM] = {}
_LINES: dict[str, int] = {}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_failure_at_any_line_of_a_step(seed: int) -> None:
    """The caller hears of it, and the engine is emptied: with swaps, forks, sessions and a step in flight."""
    rng = random.Random(seed)
    model, expected = _expected("dms")
    params = [greedy(NEW, n=3 if i % 3 == 1 else 1) for i in range(len(PROMPTS))]

    def traced(trace: Any) -> LLM:
        threading.settrace(trace)
        try:
            return engine(model, pages=64, async_scheduling=seed % 2 == 0)
        finally:
            threading.settrace(None)  # type: ignore[arg-type]

    skip = ("streams.py", "llm.py", "progress.py")
    if "step" not in _LINES:
        seen = 0

        def count(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            name = frame.f_code.co_filename
            if not name.startswith(HOME) or name.endswith(skip):
                return None
            seen += event == "line"
            return count

        traced(count).generate(PROMPTS, params, keep=True)
        _LINES["step"] = seen
    with traced(_tracer(rng.randint(1, _LINES["step"]), skip=skip)) as llm:
        with pytest.raises(Injected):  # noqa: PT012 - runs differ by a few lines
            for _ in range(2):
                llm.generate(PROMPTS, params, keep=True)
        _right(llm, expected)


def _slow(llm: LLM, seconds: float = 0.002) -> None:
    """A device that takes its time."""
    execute = llm.engine.runner.execute

    def slower(step: Any) -> Any:
        time.sleep(seconds)
        return execute(step)

    llm.engine.runner.execute = slower  # type: ignore[method-assign]


@pytest.mark.parametrize("delay", [0.001, 0.01, 0.05])
def test_control_c(delay: float) -> None:
    """A real signal, while this thread and another generate: this one stops, the other never notices."""
    model, expected = _expected("dms")
    llm = engine(model)
    _slow(llm)
    others: list[RequestOutput] = []
    other = threading.Thread(target=lambda: others.extend(llm.generate(PROMPTS, greedy(NEW))))
    other.start()
    timer = threading.Timer(delay, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - one call may end before the signal comes
        timer.start()
        while True:
            llm.generate(PROMPTS, greedy(200))
    other.join()
    assert [o.outputs[0].token_ids for o in others] == expected
    assert {c.finish_reason for o in llm.partial for c in o.outputs} <= {"abort", "length"}
    _right(llm, expected)


def test_what_an_interrupted_call_had_is_kept() -> None:
    model, expected = _expected("dense")
    llm = engine(model)
    steps, execute = 0, llm.engine.runner.execute

    def interrupting(step: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.05)
        return execute(step)

    llm.engine.runner.execute = interrupting  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], [greedy(2), greedy(200)])
    short, long = llm.partial
    assert short.finished and short.outputs[0].finish_reason == "length"
    assert short.outputs[0].token_ids == expected[0][:2]
    assert long.outputs[0].finish_reason == "abort"
    assert 0 < len(long.outputs[0].token_ids) < 200
    _right(llm, expected)
    assert llm.partial == []


def _gather(llm: LLM, count: int, params: SamplingParams, *, after: Any = None) -> list[Any]:
    """`count` streams at once: the last output of each, or what it raised."""

    async def follow(i: int) -> RequestOutput:
        last = None
        async for output in llm.stream(PROMPTS[i], params, request_id=f"r{i}"):
            last = output
            if after is not None:
                await asyncio.to_thread(after, output)
        assert last is not None
        return last

    async def everything() -> list[Any]:
        return await asyncio.wait_for(
            asyncio.gather(*(follow(i) for i in range(count)), return_exceptions=True), timeout=60
        )

    return asyncio.run(everything())


def test_an_aborted_stream_ends_with_what_it_has() -> None:
    model, _ = _expected("dms")
    llm = engine(model)

    def abort(output: RequestOutput) -> None:
        if len(output.outputs[0].token_ids) >= 3 and output.request_id == "r1":
            llm.abort("r1")

    outputs = _gather(llm, 3, greedy(40), after=abort)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "abort", "length"]
    assert all(o.finished for o in outputs)
    assert 3 <= len(outputs[1].outputs[0].token_ids) < 40
    assert_empty(llm)


def test_an_aborted_generate_returns_what_it_has() -> None:
    model, expected = _expected("dms")
    llm = engine(model)
    _slow(llm)
    timer = threading.Timer(0.1, lambda: llm.abort(next(iter(llm.engine.requests))))
    timer.start()
    (output,) = llm.generate(PROMPTS[0], greedy(200))
    timer.join()
    assert output.outputs[0].finish_reason == "abort"
    _right(llm, expected)


def test_every_stream_hears_of_a_failed_step() -> None:
    model, expected = _expected("dms")
    llm = engine(model)
    steps, execute = 0, llm.engine.runner.execute

    def failing(step: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            execute(step)
            raise RuntimeError("out of memory")
        return execute(step)

    llm.engine.runner.execute = failing  # type: ignore[method-assign]
    assert [str(e) for e in _gather(llm, 4, greedy(40))] == ["out of memory"] * 4
    _right(llm, expected)


def test_an_engine_that_cannot_be_reset_says_so() -> None:
    model, _ = _expected("dms")
    llm = engine(model)

    def lost(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    llm.engine.runner.execute = llm.engine.runner.reset = lost  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="the device is lost"):
        llm.generate(PROMPTS, greedy(3))
    with pytest.raises(ValueError, match=r"failed \(RuntimeError: the device is lost\).* make a new one"):
        llm.generate(PROMPTS, greedy(3))
    (error,) = _gather(llm, 1, greedy(3))
    assert isinstance(error, ValueError)
    llm.close()


def test_a_refused_request_disturbs_no_other() -> None:
    model, expected = _expected("dms")
    llm = engine(model)
    _slow(llm)
    others: list[RequestOutput] = []
    other = threading.Thread(target=lambda: others.extend(llm.generate(PROMPTS, greedy(NEW))))
    other.start()
    for _ in range(5):
        with pytest.raises(ValueError, match="token ids are integers"):
            llm.generate([PROMPTS[0], [99999]], greedy(NEW))
    other.join()
    assert [o.outputs[0].token_ids for o in others] == expected
    assert_empty(llm)


def test_close() -> None:
    model, expected = _expected("dms")
    others = set(threading.enumerate())  # of earlier tests, on their way out
    with engine(model) as llm:
        _right(llm, expected)
        pool = weakref.ref(llm.engine.runner.ragged.pool)
        assert [thread.name for thread in set(threading.enumerate()) - others] == ["sparsekv-engine"]
    assert not set(threading.enumerate()) - others
    assert pool() is None
    for _ in range(2):
        with pytest.raises(ValueError, match="closed"):
            llm.generate(PROMPTS, greedy(3))
        llm.abort("0")
        llm.close()
    assert isinstance(_gather(llm, 1, greedy(3))[0], ValueError)


def test_closing_ends_what_runs() -> None:
    model, _ = _expected("dms")
    llm = engine(model)
    _slow(llm)
    timer = threading.Timer(0.1, llm.close)
    timer.start()
    with pytest.raises(ValueError, match="closed"):
        llm.generate(PROMPTS, greedy(200))
    timer.join()


@pytest.mark.parametrize("leave", [False, True])
def test_dropping_an_llm_frees_pool_and_thread(leave: bool) -> None:
    """Also after streams, to the end or left half-way."""
    model, _ = _expected("dms")
    before = _settled_threads()
    llm = engine(model)
    pool, core = weakref.ref(llm.engine.runner.ragged.pool), weakref.ref(llm.engine)

    async def some(llm: LLM) -> None:
        stream = llm.stream(PROMPTS[0], greedy(40))
        async for output in stream:
            if leave and len(output.outputs[0].token_ids) > 2:
                break
        await stream.aclose()

    asyncio.run(some(llm))
    del llm
    deadline = time.monotonic() + 20
    while (_threads() > before or pool() is not None) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _threads() == before
    assert pool() is core() is None


def test_a_constructor_that_fails_leaves_the_model_as_it_was() -> None:
    from helpers import tiny_model
    from sparsekv.modeling.attached import ATTACHMENT

    model = tiny_model()
    with pytest.raises(ValueError, match="context"):
        LLM(model, policy="dense", max_model_len=10**6)
    assert not hasattr(model, ATTACHMENT)


def test_a_step_too_far_is_not_counted() -> None:
    """The statistics of an asynchronous engine are those of one that waits."""
    model, expected = _expected("dms")
    outputs = []
    for ahead in (False, True):
        llm = engine(model, async_scheduling=ahead)
        params = [greedy(NEW, stop_token_ids=[e[4]]) for e in expected]
        outputs.append([o.kv for o in llm.generate(PROMPTS, params)])
    assert outputs[0] == outputs[1]
