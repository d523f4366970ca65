"""The cells of a comparison: each measures one thing and gives JSON lines with commit, hardware and seed."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import RequestOutput
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.corpus import load_documents
from sparsekv.evals.methods.measure import measure
from sparsekv.evals.methods.setting import Setting
from sparsekv.modeling.attach import attach, detach
from sparsekv.modeling.load import load_model
from sparsekv.provenance import environment
from sparsekv.studies.comparison.study import Speed, Study
from sparsekv.studies.runner import Line


def cells_of(study: Study) -> dict[str, Callable[[], Sequence[Line]]]:
    """By name: `dense`, `tova at 4`, `speed of tova`."""
    cells: dict[str, Callable[[], Sequence[Line]]] = {"dense": partial(_quality, study, None, 1.0)}
    for ratio in study.ratios:
        for policy in study.policies:
            cells[f"{policy} at {ratio:g}"] = partial(_quality, study, policy, ratio)
    if study.speed is not None:
        for policy in ["dense", *study.policies]:
            cells[f"speed of {policy}"] = partial(_speed, study, study.speed, policy)
    return cells


def _quality(study: Study, policy: str | None, ratio: float) -> list[Line]:
    """Rows of the method; of dense, for its own cell (it is measured each time: the others are compared with it)."""
    model, tokenizer = _loaded(study.model, torch.float32)
    config = study.config
    setting = Setting() if policy is None else study.setting(policy, ratio, tokens=config.length)
    setting.attach(model)
    try:
        settings = [] if policy is None else [setting]
        rows = measure(model, tokenizer, settings, documents=load_documents([study.text])[1], config=config)
    finally:
        detach(model)
    about = {"kind": "quality", "model": study.model, **environment(model.device)}
    return [row.to_dict() | about for row in rows if row.policy == (policy or "dense")]


def _speed(study: Study, speed: Speed, policy: str) -> list[Line]:
    model, tokenizer = _loaded(study.model, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    tokens = speed.prompt + speed.output
    setting = Setting() if policy == "dense" else study.setting(policy, speed.ratio, tokens=tokens)
    options: dict[str, Any] = {"max_num_seqs": max(speed.batches), "max_model_len": tokens}
    attach(model, **setting.arguments(tokens=tokens))
    try:
        begun = time.perf_counter()
        with LLM(model, tokenizer=tokenizer, **options) as llm:
            start = time.perf_counter() - begun
            lines = [_timed(llm, study, speed, batch) for batch in speed.batches]
    finally:
        detach(model)
    about = {"kind": "speed", "model": study.model, "policy": policy, "cr": setting.cr, "seed": study.seed}
    return [line | about | {"start_seconds": start} | environment(model.device) for line in lines]


def _timed(llm: LLM, study: Study, speed: Speed, batch: int) -> Line:
    """The better of two runs after one: whole seconds, and the median time between a sequence's tokens."""
    generator = torch.Generator().manual_seed(study.seed)
    ids = torch.randint(0, llm.engine.vocab, (batch, speed.prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=speed.output, temperature=0.0, ignore_eos=True, detokenize=False)
    runs = []
    for _ in range(3):
        begun = time.perf_counter()
        outputs = llm.generate(ids, params, use_tqdm=False)
        runs.append((time.perf_counter() - begun, outputs))
    seconds, outputs = min(runs[1:], key=lambda run: run[0])
    between = [_between_tokens(output, speed.output) for output in outputs]
    return {
        "batch": batch,
        "prompt": speed.prompt,
        "output": speed.output,
        "seconds": seconds,
        "tokens_per_second": batch * speed.output / seconds,
        "step_ms": 1e3 * statistics.median(between),
        "tokens_held": sum(output.kv.tokens_held for output in outputs) / batch,
        "kv_reads": sum(output.kv.kv_reads for output in outputs) / batch,
    }


def _between_tokens(output: RequestOutput, tokens: int) -> float:
    """Mean seconds from a token to the next."""
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_time is not None and metrics.last_token_time is not None
    return (metrics.last_token_time - metrics.first_token_time) / (tokens - 1)


@cache
def _loaded(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    return load_model(name, dtype=dtype)
