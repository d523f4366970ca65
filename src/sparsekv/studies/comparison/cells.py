"""The cells of a comparison: each measures one thing and gives JSON lines with commit, hardware and seed."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from sparsekv.engine.llm import LLM
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.corpus import load_documents
from sparsekv.evals.methods.measure import measure
from sparsekv.evals.methods.setting import Setting
from sparsekv.modeling.attach import detach
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
    model, tokenizer = _loaded(study.model)
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
    model, tokenizer = _loaded(study.model)
    tokens = speed.prompt + speed.output
    setting = Setting() if policy == "dense" else study.setting(policy, speed.ratio, tokens=tokens)
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    options: dict[str, Any] = {"max_num_seqs": max(speed.batches), "max_model_len": tokens}
    begun = time.perf_counter()
    lines = []
    with LLM(model.to(dtype), tokenizer=tokenizer, **setting.arguments(tokens=tokens), **options) as llm:
        start = time.perf_counter() - begun
        for batch in speed.batches:
            lines.append(_timed(llm, study, speed, batch) | {"policy": policy, "ratio_asked": setting.cr or 1.0})
    detach(model)
    about = {"kind": "speed", "model": study.model, "start_seconds": start, "seed": study.seed}
    return [line | about | environment(model.device) for line in lines]


def _timed(llm: LLM, study: Study, speed: Speed, batch: int) -> Line:
    """Of two runs after one: whole seconds, and the median time between tokens."""
    generator = torch.Generator().manual_seed(study.seed)
    ids = torch.randint(100, 40_000, (batch, speed.prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=speed.output, temperature=0.0, ignore_eos=True, detokenize=False)
    seconds, between, outputs = [], [], []
    for _ in range(3):
        begun = time.perf_counter()
        outputs = llm.generate(ids, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
        for output in outputs:
            first, last = output.metrics.first_token_time, output.metrics.last_token_time
            between.append((last - first) / (speed.output - 1))
    best = min(seconds[1:])
    kv = [output.outputs[0].kv for output in outputs]
    return {
        "batch": batch,
        "prompt": speed.prompt,
        "output": speed.output,
        "seconds": best,
        "tokens_per_second": batch * speed.output / best,
        "step_ms": 1e3 * statistics.median(between[len(outputs) :]),
        "tokens_held": sum(x.tokens_held for x in kv) / batch,
        "kv_reads": sum(x.kv_reads for x in kv) / batch,
    }


@cache
def _loaded(name: str) -> tuple[Any, Any]:
    return load_model(name, dtype=torch.float32)
