"""Many samples over a pool for a few: the engine over a stub device whose forks share pages, and lose them in swaps."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sparsekv.bench.host import PAGE_SIZE, StubRunner
from sparsekv.engine.engine import Engine
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.ledger import Caps, Ledger
from sparsekv.engine.schedule.request import Sequence
from sparsekv.engine.schedule.scheduler import RunStep, Scheduler

PROMPT, SAMPLES, MEAN, MOST, ROWS, STOP = 124, 16, 260, 1024, 256, 1


class _Runner(StubRunner):
    """One head, dense. Samples end after a normal number of tokens, by a token that nobody foresees."""

    def __init__(self, *, pages: int) -> None:
        shape: Any = SimpleNamespace(layers=1, kv_heads=1)
        super().__init__(shape, rows=ROWS, context=PROMPT + MOST, vocabulary=1)
        self.free = self.pages = self.ragged.pool.pages = pages
        self.rng, self.ends = random.Random(0), dict[Sequence, int]()
        self.shared: dict[int, list[int]] = {}
        """By row: how many rows share its first pages, and how many pages."""
        self.steps = self.written = self.ran = self.moved = 0

    def execute(self, step: RunStep) -> Any:
        result = super().execute(step).result()
        for sequence in step.samples:
            self.ends.setdefault(sequence, max(2, round(self.rng.gauss(MEAN, MEAN / 4))))
        tokens = [STOP if s.sampled + 1 >= self.ends[s] else 0 for s in step.samples]
        self.steps, self.written, self.ran = self.steps + 1, self.written + len(tokens), self.ran + len(step.decodes)
        result = replace(result, tokens=tokens)
        return SimpleNamespace(result=lambda: result)

    def release(self, rows: list[int]) -> None:
        for row in rows:
            shared = self.shared.pop(row, [1, 0])
            shared[0] -= 1
            self.free -= shared[1] if shared[0] else 0
        super().release(rows)

    def fork_cost(self, row: int) -> int:
        return int(self.lengths[0, row, 0] % PAGE_SIZE > 0)

    def fork(self, row: int, targets: list[int]) -> None:
        self.free -= self.fork_cost(row) * len(targets)
        shared = [1 + len(targets), int(self.lengths[0, row, 0]) // PAGE_SIZE]
        self.shared |= dict.fromkeys([row, *targets], shared)
        self.lengths[:, targets] = self.lengths[:, [row]]

    def swap_out(self, row: int) -> Any:
        held = torch.tensor(self.lengths[:, row])
        self.moved += int(held.sum())
        return SimpleNamespace(lengths=held, pages=-(-int(held.sum()) // PAGE_SIZE))

    def swap_in(self, row: int, swapped: Any) -> None:
        self.lengths[:, row] = swapped.lengths.numpy()
        self.moved += int(swapped.lengths.sum())
        self.free -= swapped.pages

    def assign(self, sequence: Sequence) -> None:
        pass


def _run(*, pages: int, requests: int) -> _Runner:
    runner: Any = _Runner(pages=pages)
    caps = Caps(in_prompt=[10**6], held=lambda prompt, tokens: [10**6], prunes=[False], max_tokens=10**6)
    ledger = Ledger(caps=caps, rows=ROWS, kv_heads=1, page_size=PAGE_SIZE, pages=pages)
    scheduler = Scheduler(ledger, rows=ROWS, max_tokens=512)
    engine = Engine(runner, scheduler, max_model_len=PROMPT + MOST, vocab=2, async_scheduling=True)
    params = SamplingParams(n=SAMPLES, max_tokens=None, detokenize=False, stop_token_ids=[STOP])
    for _ in range(requests):
        engine.add([0] * PROMPT, params)
    while engine.has_work:
        engine.step()
    assert runner.free == pages
    assert not np.any(runner.lengths)
    return runner


def test_little_is_swapped_and_the_pool_is_not_idle() -> None:
    """Pages for 78 samples at once, each half written beside its part of the prompt, if only one knew when they end."""
    pages = 375
    fit = pages * PAGE_SIZE / (PROMPT / SAMPLES + MEAN / 2 + PAGE_SIZE / 2)
    runner = _run(pages=pages, requests=24)
    assert runner.written > 24 * SAMPLES * MEAN * 0.9
    assert runner.moved < 0.05 * runner.written
    assert runner.ran / runner.steps > 0.5 * fit
