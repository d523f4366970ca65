"""vLLM's engine with the plugin, in this process, and a view of its accounts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsekv.integrations.vllm import engine_args


@contextmanager
def engine(made: Any, *, method: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A vllm.LLM, gone at the end. method: what it runs; else the adapter as trained."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments = engine_args(made.model, **({"adapter": made.adapter} if method is None else method))
    defaults = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 6, "enforce_eager": True, "seed": 0}
    llm = LLM(**(arguments | defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


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


def nothing_is_left(llm: Any) -> bool:
    """No request has a row or credits; and once the workers have heard, no page is taken."""
    found = manager(llm)
    totals = found.accounts.totals()
    assert not any(totals.values()), totals
    assert found.block_pool.get_num_free_blocks() == found.blocks
    rows(llm).release(found.accounts.next_step()[1])
    cache = rows(llm).cache
    assert int(cache.lengths.sum()) == 0 and cache.pool.pages_free == cache.pool.pages
    return True
