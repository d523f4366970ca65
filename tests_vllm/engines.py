"""vLLM's engine with the plugin, in this process, and a view of its accounts."""

import gc
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sparsekv.integrations.vllm import engine_args
from sparsekv.integrations.vllm.worker.backend import SparseBuilder


@contextmanager
def engine(made: Any, *, method: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A vllm.LLM, gone at the end. method: what it runs; else the adapter as trained."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments = engine_args(made.model, **({"adapter": made.adapter} if method is None else method))
    defaults = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 6, "enforce_eager": True, "seed": 0}
    if torch.cuda.is_available():
        defaults["gpu_memory_utilization"] = 0.3  # tiny models need little; others may use the GPU too
    llm = LLM(**(arguments | defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def recorded() -> Iterator[None]:
    """Every step of an engine in this process runs what a graph of a number of tokens runs, which is recorded without
    metadata."""
    build = SparseBuilder.build

    def without(*args: Any, **options: Any) -> None:
        build(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseBuilder, "build", without)
        yield


def scheduler(llm: Any) -> Any:
    """vLLM's own."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    """Ours."""
    (found,) = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    return found


def rows(llm: Any) -> Any:
    """The one worker's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._rows


def greedy(**options: Any) -> Any:
    """vLLM's SamplingParams."""
    from vllm import SamplingParams

    return SamplingParams(**({"temperature": 0.0, "max_tokens": 40, "ignore_eos": True} | options))


def texts(llm: Any, prompts: list[list[int]], params: Any) -> list[list[list[int]]]:
    """By prompt and sample: token ids."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def arrivals_and_aborts(llm: Any, made: Any, want: list[list[int]], *, seed: int, times: int = 2) -> None:
    """Every prompt some times, in any order; requests come while others run, and some are aborted whenever. want: the
    answers, by prompt."""
    rng, core = random.Random(seed), llm.llm_engine
    waiting = list(range(len(made.prompts))) * times
    rng.shuffle(waiting)
    running: dict[str, int] = {}
    aborted = done = 0
    while waiting or running:
        if waiting and rng.random() < 0.3:
            index = waiting.pop()
            name = f"{seed} {len(waiting)}"
            core.add_request(name, {"prompt_token_ids": made.prompts[index]}, greedy())
            running[name] = index
        if running and rng.random() < 0.04:
            name = rng.choice(sorted(running))
            core.abort_request([name])
            del running[name]
            aborted += 1
        for output in core.step():
            if output.finished and output.request_id in running:
                assert list(output.outputs[0].token_ids) == want[running.pop(output.request_id)]
                done += 1
    assert aborted and done
    assert nothing_is_left(llm)


def nothing_is_left(llm: Any) -> bool:
    """No request has a row or credits; and once the workers have heard, no page is taken on any of them."""
    found = manager(llm)
    totals = found.accounts.totals()
    assert not any(totals.values()), totals
    deferred = sum(len(blocks) for _, blocks in scheduler(llm).deferred_frees)  # aborted while a step was under way
    assert found.block_pool.get_num_free_blocks() + deferred == found.blocks
    left = llm.collective_rpc(_left, args=(found.accounts.next_step()[1],))
    assert left == [(0, 0)] * len(left)
    return True


def _left(worker: Any, released: list[int]) -> tuple[int, int]:
    """In a worker: slots and pages that are taken once rows are released."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    held = get_kv_transfer_group()._rows
    held.release(released)
    return int(held.cache.lengths.sum()), held.cache.pool.pages - held.cache.pool.pages_free


def waits_of_decode_steps(llm: Any, made: Any) -> list[str]:
    """Where a host waited for a GPU while requests decode, in all workers: files and messages, vLLM's own too."""
    core = llm.llm_engine
    for index, prompt in enumerate(made.prompts[:4]):
        core.add_request(f"decode {index}", {"prompt_token_ids": prompt}, greedy(max_tokens=60))
    for _ in range(20):  # prompts are read, and what is made at the first decode step is
        core.step()
    llm.collective_rpc(_watch)
    for _ in range(20):
        core.step()
    found = llm.collective_rpc(_watched)
    assert core.has_unfinished_requests()
    while core.has_unfinished_requests():
        core.step()
    return [each for worker in found for each in worker]


def _watch(worker: Any) -> None:
    """In a worker: keep what the device's mode of synchronisation warns of."""
    worker.caught = warnings.catch_warnings(record=True, action="always")
    worker.waits = worker.caught.__enter__()
    torch.cuda.set_sync_debug_mode("warn")


def _watched(worker: Any) -> list[str]:
    torch.cuda.set_sync_debug_mode("default")
    worker.caught.__exit__(None, None, None)
    return [f"{wait.filename}:{wait.lineno} {wait.message}" for wait in worker.waits]
