"""vLLM's scheduler and its block pool over our accounts: credits are real blocks, the block that is shown is none."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparsekv.integrations.vllm import register
from sparsekv.integrations.vllm.scheduler.accounts import Report
from sparsekv.integrations.vllm.scheduler.manager import NEVER, CreditManager, manager_of
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec

HEADS, ROWS, BLOCKS = 6, 2, 9


@pytest.fixture
def manager() -> CreditManager:
    return manager_for(blocks=BLOCKS)


def spec_for(**options: Any) -> CreditSpec:
    return CreditSpec(
        block_size=32,
        num_kv_heads=HEADS,
        head_size=32,
        dtype=torch.float32,
        **({"rows": ROWS, "workers": 1, "ratio": 4.0, "window": 16, "most": None, "trusted_ratio": 4.0} | options),
    )


def manager_for(*, blocks: int) -> CreditManager:
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=False, hash_block_size=32)
    return CreditManager(spec_for(), pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=32)


def ask(manager: CreditManager, name: str, tokens: int, *, admission: bool = False) -> int:
    return manager.get_num_blocks_to_allocate(
        request_id=name,
        num_tokens=tokens,
        new_computed_blocks=[],
        total_computed_tokens=0,
        num_local_computed_tokens=0,
        num_tokens_main_model=tokens,
        apply_admission_cap=admission,
    )


def give(manager: CreditManager, name: str, tokens: int) -> list[int]:
    """Block ids that the workers are shown."""
    return [block.block_id for block in manager.allocate_new_blocks(name, tokens, tokens)]


def report(manager: CreditManager, row: int, *, seen: int, length: int) -> None:
    table = np.zeros((ROWS, 34), dtype=np.int32)
    table[:, 2] = HEADS  # of empty rows
    table[row, 2] = 0
    table[row, 0], table[row, 1], table[row, 2 + length % 32] = seen, HEADS * -(-length // 32), HEADS
    manager.settle(0, Report(step=manager.accounts.step, table=table))


def test_credits_are_blocks_of_the_pool(manager):
    free = manager.block_pool.get_num_free_blocks
    assert free() == manager.blocks == BLOCKS - 1
    assert ask(manager, "a", 100) == 4
    assert give(manager, "a", 100) == [1] and free() == 4
    assert [block.block_id for block in manager.req_to_blocks["a"]] == [1]  # row 0
    manager.accounts.next_step()
    report(manager, 0, seen=100, length=30)
    assert free() == 7  # one page for each head
    assert ask(manager, "a", 101) == 0 and give(manager, "a", 101) == []
    assert ask(manager, "a", 105) == 1
    manager.block_pool.free_blocks(reversed(manager.pop_blocks_for_free("a")))
    assert free() == BLOCKS - 1 and "a" not in manager.req_to_blocks
    assert manager.pop_blocks_for_free("a") == []
    assert manager.accounts.next_step()[1] == [0]


def test_admission_expects_and_steps_do_not(manager):
    assert ask(manager, "a", 400, admission=True) == 400 // 4 // 32 + 2
    assert ask(manager, "a", 400) == 13


def test_a_prompt_that_may_need_all_that_there_is_does_not_wait_for_more(manager):
    """vLLM would ask again in every step, for ever."""
    assert ask(manager, "a", 4000, admission=True) == BLOCKS - 1


def test_without_a_row_nothing_fits(manager):
    give(manager, "a", 1)
    give(manager, "b", 1)
    assert ask(manager, "c", 1) == NEVER
    manager.pop_blocks_for_free("a")
    assert ask(manager, "c", 1) == 1


def test_a_lone_request_that_betrays_its_ratio_stops_the_engine(manager):
    """Never preempted by itself, to start again for ever."""
    give(manager, "a", 8 * 32)
    manager.accounts.next_step()
    report(manager, 0, seen=256, length=256)
    with pytest.raises(RuntimeError, match=r"needs more than the whole KV cache.*lower trusted_ratio"):
        ask(manager, "a", 257)
    manager.block_pool.free_blocks(manager.pop_blocks_for_free("a"))
    give(manager, "a", 224)
    give(manager, "b", 32)
    assert ask(manager, "a", 257) > manager.block_pool.get_num_free_blocks() == 0  # vLLM preempts b
    assert manager.waits == 1


@pytest.mark.parametrize("running", [1, 2, 3])
def test_a_lone_request_that_keeps_its_ratio_ends_however_late_reports_are(running):
    """It has as much room as vLLM is asked for, and reports come twice as many steps late as run at once."""
    chunk, tokens = 64, 4096
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=tokens), max_in_flight_tokens=running * chunk)
    room = spec_for().max_memory_usage_bytes(config) // spec_for().page_size_bytes
    manager, late = manager_for(blocks=room), 2 * running - 1
    for seen in range(chunk, tokens + 1, chunk):
        assert ask(manager, "a", seen) <= manager.block_pool.get_num_free_blocks()
        give(manager, "a", seen)
        manager.accounts.next_step()
        reported = seen - late * chunk
        if reported > 0:
            report(manager, 0, seen=reported, length=min(reported, 16 + reported // 4))
    assert manager.waits == 0


def test_the_connector_finds_its_manager(manager):
    assert manager_of(manager.block_pool) is manager


def test_vllm_is_told_once_however_often_it_asks(monkeypatch):
    register()
    register()
    assert KVCacheSpecRegistry.get_manager_class(_spec()) is CreditManager


def test_in_another_vllm_it_stays_off_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("vllm.version.__version__", "0.99.0")
    monkeypatch.setattr("sparsekv.integrations.vllm.plugin.register_parts", _never)
    register()
    assert "sparsekv's plugin is off: it was tested with vLLM" in caplog.text


def _never() -> Any:
    raise AssertionError


def _spec() -> CreditSpec:
    options: Any = {"ratio": 1.0, "window": 1, "most": None, "trusted_ratio": 1.0}
    return CreditSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32, rows=1, workers=1, **options)
