"""How fast the engine is under a method. Engines start side by side, which is work of the CPU; each is timed alone."""

import statistics
import time
from pathlib import Path

import torch

from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import RequestOutput
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.methods.setting import Setting
from sparsekv.json_lines import Line
from sparsekv.modeling.attach import attach, detach
from sparsekv.modeling.load import load_model
from sparsekv.studies.comparison.study import Speed, Study
from sparsekv.studies.locks import held

RUNS = 3


def timed(study: Study, speed: Speed, setting: Setting, *, lock: Path) -> list[Line]:
    """A line for each batch. lock: a file that processes share; while one times, none starts."""
    tokens = speed.prompt + speed.output
    with held(lock, alone=False):
        model, tokenizer = load_model(study.model, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        begun = time.perf_counter()
        attach(model, **setting.arguments(tokens=tokens, output=speed.output))
        llm = LLM(
            model,
            tokenizer=tokenizer,
            max_num_seqs=max(speed.batches),
            max_model_len=tokens,
            kv_memory=speed.kv_memory,
        )
        start = time.perf_counter() - begun
    with held(lock), llm:
        lines = [_timed(llm, study, speed, batch) | {"start_seconds": start} for batch in speed.batches]
    detach(model)
    torch.cuda.empty_cache()  # other processes share the memory
    return lines


def _timed(llm: LLM, study: Study, speed: Speed, batch: int) -> Line:
    """The best of RUNS runs but the first: whole seconds, and the median time between a sequence's tokens."""
    generator = torch.Generator().manual_seed(study.seed)
    ids = torch.randint(0, llm.engine.vocab, (batch, speed.prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=speed.output, temperature=0.0, ignore_eos=True, detokenize=False)
    runs = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        outputs = llm.generate(ids, params, use_tqdm=False)
        runs.append((time.perf_counter() - begun, outputs))
    seconds, outputs = min(runs[1:], key=lambda run: run[0])
    return {
        "batch": batch,
        "prompt": speed.prompt,
        "output": speed.output,
        "seconds": seconds,
        "tokens_per_second": batch * speed.output / seconds,
        "step_ms": 1e3 * statistics.median(_between_tokens(output, speed.output) for output in outputs),
        "tokens_held": sum(output.kv.tokens_held for output in outputs) / batch,
        "kv_reads": sum(output.kv.kv_reads for output in outputs) / batch,
    }


def _between_tokens(output: RequestOutput, tokens: int) -> float:
    """Mean seconds from a token to the next."""
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_time is not None and metrics.last_token_time is not None
    return (metrics.last_token_time - metrics.first_token_time) / (tokens - 1)
