"""Random requests for a long time: zero pages in use at the end, and memory that does not grow."""

import gc
import random

import psutil
import pytest

from serving import assert_empty, attached, engine, prompts
from sparsekv import SamplingParams


def _soak(requests: int, *, seed: int, ahead: bool) -> None:
    rng = random.Random(seed)
    llm = engine(attached("dms"), pages=160, max_num_seqs=6, max_num_batched_tokens=24, async_scheduling=ahead)
    added, finished, process, memory, objects = 0, 0, psutil.Process(), [], []
    while added < requests or llm.engine.has_work:
        while added < requests and len(llm.engine.requests) < 10:
            params = SamplingParams(
                n=rng.choice([1, 1, 1, 2, 4]),
                max_tokens=rng.randint(1, 12),
                temperature=rng.choice([0.0, 0.7]),
                top_p=rng.choice([1.0, 0.9]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                logprobs=rng.choice([None, None, 2]),
                stop_token_ids=rng.choice([None, [3, 4, 5]]),
            )
            llm.engine.add(prompts(rng.randint(1, 40), seed=rng.randrange(1000))[0], params)
            added += 1
            if added % (requests // 4) == 0:
                gc.collect()
                memory.append(process.memory_info().rss)
                objects.append(len(gc.get_objects()))
        finished += sum(output.finished for output in llm.engine.step())
        if rng.random() < 0.02 and llm.engine.requests:
            llm.engine.abort(rng.choice(list(llm.engine.requests)))
    assert finished == requests
    assert_empty(llm)
    assert memory[-1] - memory[0] < 64 << 20
    assert objects[-1] - objects[0] < 2000


@pytest.mark.parametrize("ahead", [False, True])
def test_two_hundred_requests(ahead: bool) -> None:
    _soak(100, seed=0, ahead=ahead)


@pytest.mark.slow
def test_two_thousand_requests() -> None:
    _soak(2000, seed=1, ahead=True)
