"""The engine's thread: a slow reader, work between steps, and its death."""

import asyncio
import threading
import time
from typing import Any

import pytest

from serving import alone, assert_empty, attached, engine, greedy, prompts


def test_a_slow_reader_gets_the_newest_state() -> None:
    """And nothing piles up for it."""
    llm = engine(attached("dms"))
    prompt, lengths = prompts(9)[0], list[int]()

    async def read() -> None:
        async for output in llm.stream(prompt, greedy(40, ignore_eos=True)):
            lengths.append(len(output.outputs[0].token_ids))
            if len(lengths) == 2:
                while not llm.between_steps(lambda: not llm.engine.requests):
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)  # what has been posted to the loop is there

    asyncio.run(read())
    assert lengths[-1] == 40
    assert len(lengths) <= 4
    assert_empty(llm)


def test_a_pace_is_kept_but_for_the_last_state() -> None:
    llm = engine(attached("dms"))
    prompt, lengths = prompts(9)[0], list[int]()

    async def read() -> None:
        async for output in llm.stream(prompt, greedy(40, ignore_eos=True), pace=lambda: 60.0):
            lengths.append(len(output.outputs[0].token_ids))

    begun = time.monotonic()
    asyncio.run(read())
    assert time.monotonic() - begun < 30
    assert len(lengths) == 2
    assert lengths[-1] == 40


def test_between_steps() -> None:
    llm = engine(attached("dms"))
    assert llm.between_steps(lambda: threading.current_thread().name) == "sparsekv-engine"
    with pytest.raises(KeyError):
        llm.between_steps(lambda: {}["missing"])
    assert llm.alive
    model, prompt = llm.model, prompts(5)[0]
    assert llm.generate(prompt, greedy(3))[0].outputs[0].token_ids == alone(model, prompt, 3)
    llm.close()
    assert not llm.alive
    with pytest.raises(ValueError, match="closed"):
        llm.between_steps(lambda: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_told_to_all() -> None:
    llm = engine(attached("dms"))
    streams: Any = llm._streams

    def die() -> None:
        raise SystemError("the thread goes")

    async def wait() -> None:
        stream = llm.stream(prompts(9)[0], greedy(2000, ignore_eos=True))
        await anext(stream)  # type: ignore[arg-type]
        streams._jobs.put(die)
        async for _ in stream:
            pass

    with pytest.raises(ValueError, match="thread died"):
        asyncio.run(wait())
    until = time.monotonic() + 5
    while streams._thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not llm.alive
    with pytest.raises(ValueError, match="thread died"):
        llm.generate(prompts(3), greedy(1))
