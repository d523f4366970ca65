"""Workers in processes of their own, each with its share of the KV heads, plugin by entry point: the same answers."""

from engines import engine, greedy, manager, texts
from models import LAYERS


def test_tensor_parallel(made):
    """Two heads on two workers, which forget differently; credits follow the fuller one."""
    llama = made("Llama")
    want = [list(output.outputs[0].token_ids) for output in llama.answers()]
    with engine(llama, num_gpu_blocks_override=10, max_num_batched_tokens=48, tensor_parallel_size=2) as llm:
        assert [x for (x,) in texts(llm, llama.prompts, greedy())] == want
        found = manager(llm)
        assert found.spec.workers == 2 and found.spec.num_kv_heads == LAYERS
        assert found.block_pool.get_num_free_blocks() == found.blocks
