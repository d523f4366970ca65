"""Workers in processes of their own, each with its share of the heads or layers, plugin by entry point: the same
answers, and nothing left on any."""

import pytest
import torch

from engines import (
    arrivals_and_aborts,
    engine,
    greedy,
    manager,
    nothing_is_left,
    texts,
    waits_of_decode_steps,
)
from models import LAYERS

GPUS = torch.cuda.device_count()
TIMES = 25 if GPUS else 2
"""How often each of the eight prompts comes among the mixed requests."""


def test_tensor_parallel(made):
    """Two heads on two workers, which forget differently; credits follow the fuller one."""
    llama = made("Llama")
    want = [list(output.outputs[0].token_ids) for output in llama.answers()]
    with engine(llama, num_gpu_blocks_override=10, max_num_batched_tokens=48, tensor_parallel_size=2) as llm:
        assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want
        found = manager(llm)
        assert found.spec.workers == 2 and found.spec.num_kv_heads == LAYERS
        assert nothing_is_left(llm)
        arrivals_and_aborts(llm, llama, want, seed=0, times=TIMES)
        assert found.waits > 0  # requests did wait for pages


@pytest.mark.skipif(GPUS < 2, reason="vLLM's CPU build cannot run pipeline parallel; needs two GPUs")
def test_pipeline_parallel(made):
    """Two layers on one worker and one on the other; credits are counted in those of the larger stage."""
    llama = made("Llama")
    want = [list(output.outputs[0].token_ids) for output in llama.answers()]
    with engine(llama, num_gpu_blocks_override=10, max_num_batched_tokens=48, pipeline_parallel_size=2) as llm:
        assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want
        assert manager(llm).spec.workers == 2
        assert nothing_is_left(llm)
        arrivals_and_aborts(llm, llama, want, seed=0, times=TIMES)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rank_waits_in_a_decode_step(made, ranks):
    """Graphs and all, nothing of ours makes the host wait."""
    if ranks > GPUS:
        pytest.skip("there are no such devices to wait for; needs a GPU for each rank")
    llama = made("Llama")
    want = [list(output.outputs[0].token_ids) for output in llama.answers()]
    graphs = {"compilation_config": {"max_cudagraph_capture_size": 64}}  # few to record, and more than requests at once
    with engine(llama, enforce_eager=False, tensor_parallel_size=ranks, **graphs) as llm:
        assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want
        waits = waits_of_decode_steps(llm, llama)
        assert not [wait for wait in waits if "sparsekv" in wait], waits
        assert nothing_is_left(llm)
