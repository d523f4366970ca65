"""What users wait for, end to end through LLM: requests in, tokens out, by the clock on the wall.

Prefill, scheduling, sampling and reading back are all counted. Weights and prompts are random and marks come by chance
at the ratio asked; speed does not depend on what they say. Each engine is made, timed, and freed before the next.
"""

import asyncio
import gc
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from sparsekv import LLM, SamplingParams
from sparsekv.bench.shapes import shape_of
from sparsekv.bench.step import mark_at, random_model
from sparsekv.bench.timing import median
from sparsekv.modeling.attach import detach
from sparsekv.provenance import environment

WINDOW = 64
SPARE_TOKENS = 16
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6, "seed": 1},
    "top-p": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 1},
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """`requests` prompts of `prompt` random tokens, each answered `samples` times by `output` tokens."""

    name: str
    ratio: float
    requests: int
    prompt: int
    output: int | tuple[int, int]
    """Tokens, or the range from which each request's number is drawn."""
    rows: int
    """Sequences at once."""
    samples: int = 1
    sampling: str = "greedy"
    shape: str = "qwen3-8b"
    memory: int = 40 * 2**30
    """Bytes for keys and values."""
    arrivals: float | None = None
    """Requests a second, at random moments (a Poisson process); None = all at once."""

    @property
    def longest(self) -> int:
        return self.prompt + (self.output if isinstance(self.output, int) else self.output[1])

    @property
    def engine(self) -> tuple[Any, ...]:
        """Works that agree in this share an engine."""
        return self.shape, self.ratio, self.rows, self.memory


def _short(sampling: str) -> Work:
    return Work(name=f"short-{sampling}", ratio=8, requests=64, prompt=256, output=256, rows=64, sampling=sampling)


WORKS = [
    *(_short(sampling) for sampling in SAMPLING),
    Work(name="churn-8", ratio=8, requests=512, prompt=256, output=(64, 447), rows=64),
    Work(name="arrivals-8", ratio=8, requests=200, prompt=256, output=(64, 447), rows=64, arrivals=10.0),
    Work(name="middle-8", ratio=8, requests=64, prompt=1024, output=1024, rows=64),
    Work(name="churn-1", ratio=1, requests=512, prompt=256, output=(64, 447), rows=64),
    Work(name="long-1", ratio=1, requests=57, prompt=1024, output=4096, rows=64),
    Work(name="long-8", ratio=8, requests=384, prompt=1024, output=4096, rows=384),
    *(
        Work(
            name=f"chains-{ratio}",
            ratio=ratio,
            requests=32,
            samples=8,
            prompt=64,
            output=700,
            rows=256,
            sampling="temperature",
            shape="smollm2-135m",
        )
        for ratio in (1, 8)
    ),
]


def works_of(names: Sequence[str]) -> list[Work]:
    """Those of WORKS with these names. Raises ValueError for an unknown one."""
    known = {work.name: work for work in WORKS}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown row {name!r}; use some of {', '.join(known)}")
    return [known[name] for name in names]


def bench_serve(
    works: Sequence[Work], *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A result for each start of an engine, and for each work as soon as it is done. Works in a row that agree in
    shape, ratio, rows and memory share an engine."""
    groups: list[list[Work]] = []
    for work in works:
        if groups and groups[-1][0].engine == work.engine:
            groups[-1].append(work)
        else:
            groups.append([work])
    for group in groups:
        yield from _group(group, device, dtype, seed)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _group(works: list[Work], device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    work = works[0]
    length = max(each.longest for each in works) + SPARE_TOKENS
    model = random_model(shape_of(work.shape), context=length, device=device, dtype=dtype)
    _wait(device)
    begun = time.perf_counter()
    policy: dict[str, Any] = {"policy": "dms", "window": WINDOW} if work.ratio > 1 else {"policy": "dense"}
    batch = max(8192, work.rows)
    llm = LLM(model, kv_memory=work.memory, max_num_seqs=work.rows, max_num_batched_tokens=batch, **policy)
    mark_at(model, work.ratio)
    _wait(device)
    start, begun = time.perf_counter() - begun, time.perf_counter()
    shared = {"engine": "sparsekv", "shape": work.shape, "ratio": work.ratio, "rows": work.rows}
    shared |= {"memory": work.memory, "seed": seed, **environment(device)}
    try:
        vocabulary = shape_of(work.shape).vocabulary
        for kind in dict.fromkeys(each.sampling for each in works):
            llm.generate(random_prompts(work.rows, 64, vocabulary, seed=seed), _params(kind, 16))
        if not all(isinstance(each.output, int) for each in works):
            _all_sizes(llm, work, vocabulary, seed)
        first = time.perf_counter() - begun
        yield {"bench": "serve", "work": "start", "start_s": start, "first_requests_s": first, **shared}
        for each in works:
            yield {"bench": "serve", "work": each.name, **_run(llm, each, vocabulary, seed), **shared}
    finally:
        del llm
        detach(model)


def _all_sizes(llm: LLM, work: Work, vocabulary: int, seed: int) -> None:
    """A batch of every size and some prompts at once, so that each graph that the work may want is recorded."""
    llm.generate(
        random_prompts(work.rows, 64, vocabulary, seed=seed), [_params("greedy", 16 + i) for i in range(work.rows)]
    )
    for count in range(1, 9):
        llm.generate(random_prompts(count, work.prompt, vocabulary, seed=seed), _params("greedy", 1))


def _run(llm: LLM, work: Work, vocabulary: int, seed: int) -> dict[str, Any]:
    """Raises RuntimeError where a request did not get all its tokens: then the figure would mean nothing."""
    prompts = random_prompts(work.requests, work.prompt, vocabulary, seed=seed)
    lengths = output_lengths(work, seed=seed)
    params = [_params(work.sampling, length, n=work.samples) for length in lengths]
    begun, times = time.perf_counter(), []
    if work.arrivals is None:
        outputs = llm.generate(prompts, params)
    else:
        arriving = _arrive(llm, prompts, params, rate=work.arrivals, draw=random.Random(seed))
        outputs, times = asyncio.run(arriving)
    seconds = time.perf_counter() - begun
    completions = [completion for output in outputs for completion in output.outputs]
    written = sum(len(completion.token_ids) for completion in completions)
    if written != work.samples * sum(lengths):
        raise RuntimeError(f"{work.name}: {written} tokens came of {work.samples * sum(lengths)}")
    kept = [completion.kv for completion in completions if completion.kv is not None]
    result = {
        "requests": work.requests,
        "samples": work.samples,
        "prompt": work.prompt,
        "output": work.output,
        "sampling": work.sampling,
        "seconds": seconds,
        "tokens_per_s": written / seconds,
        "ratio_held": sum(kv.tokens_seen for kv in kept) / sum(kv.tokens_held for kv in kept),
    }
    return result | (_gaps(times) | {"arrivals": work.arrivals} if times else {})


async def _arrive(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], *, rate: float, draw: random.Random
) -> tuple[list[Any], list[list[float]]]:
    """Outputs, and for each request the moments: of its arrival, then of each token."""

    async def one(prompt: list[int], each: SamplingParams) -> tuple[Any, list[float]]:
        moments, outputs = [time.perf_counter()], []
        async for output in llm.stream(prompt, each):
            moments.append(time.perf_counter())
            outputs = [output]
        return outputs[0], moments

    tasks = []
    for prompt, each in zip(prompts, params, strict=True):
        tasks.append(asyncio.create_task(one(prompt, each)))
        await asyncio.sleep(draw.expovariate(rate))
    done = await asyncio.gather(*tasks)
    return [output for output, _ in done], [moments for _, moments in done]


def _gaps(times: list[list[float]]) -> dict[str, float]:
    """Milliseconds from arrival to the first token, and between tokens."""
    first = sorted(1e3 * (moments[1] - moments[0]) for moments in times)
    gaps = sorted(1e3 * (b - a) for moments in times for a, b in pairwise(moments[1:]))
    last = {"first_ms": first, "gap_ms": gaps}
    return {f"{name}_median": median(v) for name, v in last.items()} | {
        f"{name}_p99": v[int(0.99 * (len(v) - 1))] for name, v in last.items()
    }


def _params(sampling: str, tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, n=n, **SAMPLING[sampling])


def output_lengths(work: Work, *, seed: int) -> list[int]:
    """How many tokens each request is answered with."""
    draw, output = random.Random(seed), work.output
    return [output if isinstance(output, int) else draw.randint(*output) for _ in range(work.requests)]


def random_prompts(count: int, tokens: int, vocabulary: int, *, seed: int) -> list[list[int]]:
    """Token ids of `count` prompts."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
