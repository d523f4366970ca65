"""The metadata of a step: rows from block tables on the device, in memory that never moves; padding is nobody's."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from models import LAYERS
from sparsekv.integrations.vllm import engine_args
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec, expected_tokens
from sparsekv.integrations.vllm.worker.backend import SparseBuilder
from sparsekv.integrations.vllm.worker.buffers import StepBuffers
from sparsekv.integrations.vllm.worker.loader import first_head

SPEC = CreditSpec(
    block_size=32,
    num_kv_heads=LAYERS * 2,
    head_size=32,
    dtype=torch.float32,
    rows=6,
    workers=1,
    ratio=4.0,
    window=16,
    most=None,
    trusted_ratio=1.0,
)


@pytest.fixture(scope="module")
def config(made) -> Any:
    llama = made("Llama")
    arguments = engine_args(llama.model, adapter=llama.adapter) | {"dtype": "float32", "max_model_len": 256}
    return EngineArgs(**arguments | {"max_num_batched_tokens": 64, "max_num_seqs": 6}).create_engine_config()


@pytest.fixture
def buffers() -> StepBuffers:
    return StepBuffers(requests=6, places=64, max_tokens=256, device=torch.device("cpu"))


@pytest.fixture
def builder(config, buffers) -> SparseBuilder:
    changed = copy.deepcopy(config)
    layer = SimpleNamespace(sparsekv=SimpleNamespace(rows=SimpleNamespace(buffers=buffers)))
    changed.compilation_config.static_forward_context["0.attn"] = layer
    return SparseBuilder(SPEC, ["0.attn"], changed, torch.device("cpu"))


def step(
    lengths: list[int], *, seen: list[int], blocks: list[int], requests: int, tokens: int, dummy: bool = False
) -> CommonAttentionMetadata:
    """Requests of `lengths` new tokens, padded to `requests` and `tokens` as for a graph; block tables are stale where
    nothing is written. dummy: no token has a slot."""
    total = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    starts = torch.cat([starts, torch.full((requests - len(lengths),), total)]).int()
    slots = torch.full((tokens,), -1)
    if not dummy:
        slots[:total] = torch.arange(total)
    table = torch.zeros(requests, 8, dtype=torch.int32)
    table[: len(blocks), 0] = torch.tensor(blocks)
    table[:, 1:] = 77
    after = [s + n for s, n in zip(seen, lengths, strict=True)] + [0] * (requests - len(lengths))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(after, dtype=torch.int32),
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=max(lengths),
        max_seq_len=256,
        block_table_tensor=table,
        slot_mapping=slots,
    )


def test_decodes_padded_for_a_graph(builder):
    found = builder.build(0, step([1, 1, 1], seen=[9, 70, 4], blocks=[3, 1, 6], requests=5, tokens=5))
    (part,) = found.parts
    assert part.tokens == 5 and part.batch.longest == 1
    assert part.batch.rows.tolist() == [2, 0, 5, -1, -1]
    assert part.seen[:3].tolist() == [9, 70, 4]


def test_more_places_than_requests(builder, buffers):
    """A graph is padded to 8 decodes where six requests may run."""
    (part,) = builder.build(0, step([1] * 6, seen=[1] * 6, blocks=[1, 2, 3, 4, 5, 6], requests=8, tokens=8)).parts
    assert part.batch.rows.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_a_mixed_step(builder, buffers):
    """Decodes, then chunks, of which one has a single token; tokens and requests are padded."""
    found = builder.build(
        0, step([1, 1, 7, 1, 5], seen=[9, 70, 0, 31, 64], blocks=[3, 1, 6, 2, 4], requests=6, tokens=32)
    )
    decodes, part = found.parts
    assert decodes.batch.rows.tolist() == [2, 0]
    assert part.tokens == 13 and part.batch.longest == 7
    assert part.batch.rows.tolist() == [5, 1, 3] and part.batch.starts.tolist() == [0, 7, 8, 13]
    assert part.seen.tolist() == [0, 31, 64]
    decodes, part = buffers.recorded(32)
    assert decodes.batch.rows.tolist() == [2, 0, -1, -1, -1, -1]
    assert part.batch.rows.tolist() == [-1, -1, 5, 1, 3, -1, -1]
    assert part.batch.starts.tolist() == [0, 1, 2, 9, 10, 15, 15, 32]


def test_a_lone_chunk_of_one_token_is_a_decode_step(builder):
    (part,) = builder.build(0, step([1], seen=[0], blocks=[1], requests=1, tokens=1)).parts
    assert part.batch.longest == 1 and part.seen.tolist() == [0]


def test_a_dummy_batch_touches_no_row(builder, buffers):
    """A rank with nothing to do runs with block tables of requests that are gone."""
    found = builder.build(0, step([1, 1], seen=[5, 5], blocks=[3, 1], requests=4, tokens=4, dummy=True))
    (part,) = found.parts
    assert part.batch.rows.tolist() == [-1] * 4
    assert all((part.batch.rows == -1).all() for part in buffers.recorded(4))


def test_nothing_moves_between_steps(builder, buffers):
    """What a recorded graph reads is where it was, and tells of the newest step."""
    first = builder.build_for_cudagraph_capture(
        step([1] * 4, seen=[0] * 4, blocks=[], requests=4, tokens=4, dummy=True)
    )
    (recorded,) = first.parts
    builder.build(0, step([1, 1, 9], seen=[3, 4, 0], blocks=[2, 5, 1], requests=3, tokens=16))
    builder.build(0, step([1, 1], seen=[9, 70], blocks=[3, 1], requests=4, tokens=4))
    assert recorded.batch.rows.tolist() == [2, 0, -1, -1]
    assert recorded.seen[:2].tolist() == [9, 70]
    assert recorded.batch.starts.tolist() == [0, 1, 2, 3, 4]


def test_full_graphs_are_for_decodes(config):
    assert SparseBuilder.get_cudagraph_support(config, SPEC) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert SparseBuilder.reorder_batch_threshold == 1


@pytest.mark.parametrize(
    ("total", "ranks", "want"), [(8, 1, [0]), (8, 4, [0, 2, 4, 6]), (2, 4, [0, 0, 1, 1]), (1, 2, [0, 0])]
)
def test_each_rank_takes_its_heads(total, ranks, want):
    assert [first_head(total=total, rank=rank, ranks=ranks) for rank in range(ranks)] == want


def test_one_whole_sequence_is_asked_for(config):
    """In blocks of all heads, and one that is vLLM's; less where a ratio is trusted."""
    page = SPEC.page_size_bytes
    assert page == 2 * 32 * SPEC.num_kv_heads * 32 * 4
    assert SPEC.max_memory_usage_bytes(config) == (256 // 32 + 1) * page
    trusting = CreditSpec(**{**SPEC.__dict__, "trusted_ratio": 4.0})
    assert trusting.max_memory_usage_bytes(config) == (-(-(64 + 16 + 16 + 2 * 64) // 32) + 1) * page
    long = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100), max_in_flight_tokens=2048)
    assert trusting.max_memory_usage_bytes(long) == (-(-100 // 32) + 1) * page


def test_what_is_expected_of_a_request():
    assert [expected_tokens(SPEC, n) for n in (5, 16, 40, 400)] == [5, 16, 16, 100]
    trusting = CreditSpec(**{**SPEC.__dict__, "trusted_ratio": 8.0})
    assert expected_tokens(trusting, 400) == 50
    streaming = CreditSpec(**{**SPEC.__dict__, "ratio": 1.0, "most": 64})
    assert [expected_tokens(streaming, n) for n in (5, 64, 400)] == [5, 64, 64]
