"""What is reckoned before it is allocated is what is allocated then."""

import pytest
import torch

import sparsekv
from helpers import random_heads, tiny_model
from serving import attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.device.memory import check_page_size, table_bytes, working_bytes


@pytest.mark.parametrize("policy", ["dms", "dense", "streaming"])
def test_tables_to_the_byte(policy: str) -> None:
    model = attached(policy)
    cache = engine(model, max_num_seqs=5).engine.runner.cache
    ragged = cache.ragged
    tensors = [ragged.pages, ragged.lengths, ragged.seen, ragged.tickets, ragged.samples, *ragged.rings]
    windows = [policy.window(i) for i, policy in enumerate(cache.executor.policies)]
    reckoned = table_bytes(windows=windows, kv_heads=2, rows=5, columns=ragged.pages.shape[-1])
    assert reckoned == sum(x.numel() * x.element_size() for x in tensors)


def test_pages_that_kernels_cannot_read() -> None:
    check_page_size(24, torch.device("cpu"))
    check_page_size(32, torch.device("cuda"))
    with pytest.raises(ValueError, match="page_size is 24; on a GPU it must be a power of two"):
        check_page_size(24, torch.device("cuda"))


@pytest.mark.gpu
def test_a_step_takes_no_more_than_reckoned() -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    model = tiny_model(head_dim=64, vocab_size=100_000, max_position_embeddings=8192, **shape)
    sparsekv.attach(model, policy="dms", window=16)
    model = random_heads(model).to("cuda", torch.bfloat16)
    llm = LLM(model, kv_memory="256MiB", max_num_seqs=8, max_num_batched_tokens=4096)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    params = SamplingParams(max_tokens=8, seed=0, top_p=0.9, repetition_penalty=1.1, logprobs=5)
    llm.generate(prompts(4000, 4000, 100, 50), params)
    assert torch.cuda.max_memory_allocated() - before < working_bytes(model, rows=8, tokens=4096)
