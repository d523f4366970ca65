"""The server under load, over HTTP: throughput, times to the first token and between tokens, and what twice the load
that it can bear does to it. Clients run in a process of their own.

    direct     all requests at once through LLM.generate: the engine alone, without streams and HTTP
    peak       the same through HTTP: the most that it serves
    steady     requests at random moments (Poisson), at LOAD of the peak's rate
    twice      at twice the peak's rate: what is not refused must still be served, and as fast

Texts that come together are one moment: a gap is the time between two moments of one request.
"""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sparsekv.bench.shapes import shape_of
from sparsekv.bench.step import mark_at, random_model
from sparsekv.engine.llm import LLM
from sparsekv.engine.params import SamplingParams
from sparsekv.modeling.attach import detach
from sparsekv.modeling.load import load_model
from sparsekv.provenance import environment
from sparsekv.server.load.clients import Met, Plan
from sparsekv.server.run import DrainingServer
from sparsekv.server.service import Service
from sparsekv.server.settings import ServerSettings

LOAD = 0.7
NAME = "bench"
WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is served and what is asked of it."""

    shape: str | None = "qwen3-8b"
    """With random weights and marks; None = the embedded model with an adapter."""
    adapter: str | None = None
    ratio: float = 8.0
    rows: int = 64
    memory: int = 40 * 2**30
    """Bytes for keys and values, the same at every ratio."""
    requests: int = 256
    prompt: tuple[int, int] = (128, 1024)
    output: tuple[int, int] = (64, 448)

    @property
    def context(self) -> int:
        return self.prompt[1] + self.output[1] + 16


def bench_http(
    setup: Setup, *, device: torch.device, dtype: torch.dtype, seed: int = 0, commit: str | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each of direct, peak, steady and twice. commit: written to each; None = what git says."""
    llm, vocabulary = _engine(setup, device, dtype)
    service = Service(llm, ServerSettings(name=NAME, max_waiting=setup.rows, prefix_cache=0))
    server = DrainingServer(service, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    shared = {"bench": "serve-http", **asdict(setup), "seed": seed} | environment(device)
    shared |= {"commit": commit} if commit else {}
    try:
        thread.start()
        while not server.started:
            time.sleep(0.01)
        plan = Plan(
            port=server.servers[0].sockets[0].getsockname()[1],
            model=NAME,
            requests=setup.requests,
            prompt=setup.prompt,
            output=setup.output,
            vocabulary=vocabulary,
            seed=seed,
        )
        together = replace(plan, requests=min(plan.requests, 2 * setup.rows))
        _send(replace(together, output=(16, 16 + setup.rows)))
        _direct(llm, together)  # what is recorded when it is first used is recorded now
        direct = _direct(llm, together)
        yield {"load": "direct", "tokens_per_s": direct, **shared}
        peak = summary(_send(together))
        yield {"load": "peak", **peak, "http_cost": direct / peak["tokens_per_s"] - 1, **shared}
        rate = peak["requests_per_s"]
        for load, at in (("steady", LOAD * rate), ("twice", 2 * rate)):
            found = summary(_send(replace(plan, rate=at)))
            of_peak = found["tokens_per_s"] / peak["tokens_per_s"]
            yield {"load": load, "arrivals": at, **found, "of_peak": of_peak, **shared}
    finally:
        server.should_exit = True
        thread.join()
        model = llm.model
        llm.close()
        detach(model)


def summary(met: Sequence[Met]) -> dict[str, Any]:
    """Of the requests that were served whole; the clock runs from the first sent to the last moment.

    Raises RuntimeError for a status other than 200 and 429: then the figures would mean nothing.
    """
    strange = {each.status for each in met} - {200, 429}
    if strange:
        raise RuntimeError(f"the server answered with {sorted(strange)}")
    served = [each for each in met if each.status == 200]
    seconds = max(each.moments[-1] for each in served) - min(each.sent for each in met)
    first = sorted(1e3 * (each.moments[0] - each.sent) for each in served)
    gaps = sorted(1e3 * (b - a) for each in served for a, b in pairwise(each.moments))
    return {
        "requests_sent": len(met),
        "refused": len(met) - len(served),
        "seconds": seconds,
        "requests_per_s": len(served) / seconds,
        "tokens_per_s": sum(each.tokens for each in served) / seconds,
        **{f"first_ms_p{p}": _at(first, p) for p in (50, 99)},
        **{f"gap_ms_p{p}": _at(gaps, p) for p in (50, 99)},
    }


def _at(values: list[float], percent: int) -> float:
    return values[int(percent / 100 * (len(values) - 1))]


def _send(plan: Plan) -> list[Met]:
    command = [sys.executable, "-m", "sparsekv.server.load.clients"]
    done = subprocess.run(command, input=json.dumps(asdict(plan)), capture_output=True, text=True, check=True)
    return [Met(**each) for each in json.loads(done.stdout)]


def _direct(llm: LLM, plan: Plan) -> float:
    """Tokens a second of the same requests by the engine alone."""
    draw, prompts, params = random.Random(plan.seed), [], []
    for _ in range(plan.requests):
        prompts.append([draw.randrange(plan.vocabulary) for _ in range(draw.randint(*plan.prompt))])
        params.append(SamplingParams(max_tokens=draw.randint(*plan.output), temperature=0, ignore_eos=True))
    begun = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - begun)


def _engine(setup: Setup, device: torch.device, dtype: torch.dtype) -> tuple[LLM, int]:
    """And how many token ids a prompt may be drawn from."""
    options: dict[str, Any] = {"kv_memory": setup.memory, "max_num_seqs": setup.rows, "max_model_len": setup.context}
    options["max_num_batched_tokens"] = max(2048 if device.type == "cpu" else 8192, setup.rows)
    if setup.shape is None:
        model, tokenizer = load_model("smollm2-135m", dtype=dtype, device=device.type)
        if setup.ratio > 1:
            options |= {"adapter": setup.adapter, "cr": setup.ratio}
        return LLM(model, tokenizer=tokenizer, **options), len(tokenizer)
    model = random_model(shape_of(setup.shape), context=setup.context, device=device, dtype=dtype)
    policy: dict[str, Any] = {"policy": "dms", "window": WINDOW} if setup.ratio > 1 else {"policy": "dense"}
    vocabulary = shape_of(setup.shape).vocabulary
    llm = LLM(model, tokenizer=numbered(vocabulary), **options, **policy)
    mark_at(model, setup.ratio)
    return llm, vocabulary


def numbered(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which each token is a word, so that each that comes is seen."""
    words = WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
