"""What the host does in a decode step: the engine over a device that answers at once.

No model, no forward: scheduler, ledger, what a token does to its sequence, and the text where it is read at each token,
for a stop string or for a stream. It must not grow with the output. With `ending`, sequences end at random after so
many tokens in the mean, and others take their rows.
"""

import itertools
import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sparsekv.bench.shapes import Shape
from sparsekv.bench.timing import median
from sparsekv.engine.device.runner import StepResult
from sparsekv.engine.engine import Engine
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.ledger import Caps, Ledger
from sparsekv.engine.schedule.request import Request
from sparsekv.engine.schedule.scheduler import RunStep, Scheduler
from sparsekv.provenance import environment

PROMPT, PAGE_SIZE, VOCABULARY = 16, 32, 94
TEXTS = {"none": {"detokenize": False}, "stop": {"stop": ["never said"]}, "stream": {}}
"""How the text is read: never, at each token for a stop string, at each token with a snapshot of the request."""


class StubRunner:
    """A dense cache that holds nothing: every head grows by a slot a token."""

    def __init__(self, shape: Shape, *, rows: int, context: int, vocabulary: int) -> None:
        self.device = torch.device("cpu")
        self.lengths = np.zeros((shape.layers, rows, shape.kv_heads), dtype=np.int32)
        self.free = self.pages = shape.layers * shape.kv_heads * rows * -(-context // PAGE_SIZE)
        self.ragged = SimpleNamespace(rows=rows, pool=SimpleNamespace(pages=self.pages, page_bytes=1))
        self._tokens = itertools.cycle(np.random.default_rng(0).integers(0, vocabulary, (64, rows)).tolist())

    def execute(self, step: RunStep) -> Any:
        """A step that is done at once."""
        counts = np.zeros(self.lengths.shape[1], dtype=np.int32)
        counts[step.rows] = 1
        counts[[c.sequence.row_() for c in step.chunks]] = [c.count for c in step.chunks]
        self.grow(counts)
        tokens = next(self._tokens)[: len(step.samples)]
        result = StepResult(
            tokens=tokens, logprobs=None, prompt_logprobs=[], lengths=self.lengths.copy(), free=self.free, reads=None
        )
        return SimpleNamespace(result=lambda: result)

    def release(self, rows: list[int]) -> None:
        """Empty rows."""
        self.free += int((-(-self.lengths[:, rows] // PAGE_SIZE)).sum())
        self.lengths[:, rows] = 0

    def account(self) -> tuple[NDArray[np.int32], int]:
        """Lengths and free pages."""
        return self.lengths.copy(), self.free

    def grow(self, counts: NDArray[np.int32]) -> None:
        """Every head of row r takes counts[r] slots."""
        now = self.lengths[0, :, 0]
        pages = -(-(now + counts) // PAGE_SIZE) - -(-now // PAGE_SIZE)
        self.free -= int(pages.sum()) * self.lengths.shape[0] * self.lengths.shape[2]
        self.lengths += counts[:, None]


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character of ASCII but the space: text in which no character spans two tokens."""
    raw = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(VOCABULARY)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def bench_host(
    shape: Shape, *, sequences: int, output: int, text: str = "none", ending: int | None = None, steps: int = 50
) -> dict[str, Any]:
    """Median and mean milliseconds of a step of `sequences` sequences that have written `output` tokens each. text: of
    TEXTS; ending: tokens in the mean after which one ends; None = never."""
    tokenizer, context = letters_tokenizer(), PROMPT + output + 2 * steps + 2 * (ending or 0)
    runner: Any = StubRunner(shape, rows=sequences, context=context, vocabulary=VOCABULARY)
    caps = Caps(
        in_prompt=[context] * shape.layers,
        held=lambda prompt, tokens: [tokens] * shape.layers,
        prunes=[False] * shape.layers,
        max_tokens=context,
    )
    ledger = Ledger(caps=caps, rows=sequences, kv_heads=shape.kv_heads, page_size=PAGE_SIZE, pages=runner.pages)
    scheduler = Scheduler(ledger, rows=sequences, max_tokens=2 * sequences * PROMPT)
    engine = Engine(
        runner, scheduler, max_model_len=context, vocab=VOCABULARY, tokenizer=tokenizer, async_scheduling=True
    )
    rng = random.Random(0)

    def add() -> Request:
        most = None if ending is None else output + rng.randint(1, 2 * ending)
        return engine.add([7] * PROMPT, SamplingParams(max_tokens=most, temperature=0.0, **TEXTS[text]))

    requests = [add() for _ in range(sequences)]
    while scheduler.waiting or any(r.sequences[0].sampled < 2 for r in requests if not r.finished):
        engine.step()
    _write(engine, output)
    for _ in range(3):
        engine.step()
    times, ended = [], 0
    for _ in range(steps):
        start = time.perf_counter()
        changed = engine.step()
        if text == "stream":
            for request in changed:
                request.output()
        times.append(1e3 * (time.perf_counter() - start))
        for request in changed:
            if request.finished:
                ended += 1
                add()
    found = {"bench": "host", "shape": shape.name, "sequences": sequences, "output": output, "text": text}
    found |= {"ending": ending, "ended": ended}
    return (
        found
        | {"ms": median(times), "mean_ms": sum(times) / steps, "worst_ms": max(times)}
        | environment(torch.device("cpu"))
    )


def _write(engine: Engine, tokens: int) -> None:
    """As if every sequence had written so many tokens more."""
    engine.abort()  # reads back what is in flight
    runner: Any = engine.runner
    runner.grow(np.full(runner.ragged.rows, tokens, dtype=np.int32))
    for request in engine.requests.values():
        (sequence,) = request.sequences
        sequence.tokens.extend(i % VOCABULARY for i in range(tokens))
        sequence.placed += tokens
        sequence.sampled += tokens
        sequence.read_text()
    engine.scheduler.ledger.refresh(runner.lengths.copy(), runner.free)
