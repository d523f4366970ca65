"""CreditManager: vLLM's scheduler asks it how many blocks a request needs; it answers by the accounts.

Blocks are never shown to the workers. A request's block table holds one block that does not exist, row + 1: so column 0
of the table, less one, is the row, on the device and ordered as the batch, and -1 for padding, which vLLM gives its
block 0.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sparsekv.integrations.vllm.scheduler.accounts import Accounts, Report
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec, expected_tokens

NEVER = 1 << 30
"""More blocks than any pool has."""
_MANAGERS: "WeakValueDictionary[int, CreditManager]" = WeakValueDictionary()
"""By the identity of the block pool, which is all of the scheduler that a connector is shown."""


def manager_of(block_pool: BlockPool) -> "CreditManager":
    """The manager that shares a block pool with the connector."""
    return _MANAGERS[id(block_pool)]


class CreditManager(SingleTypeKVCacheManager):
    """Credits are blocks of vLLM's pool, so that its free count, its limits and its metrics are true."""

    def __init__(self, kv_cache_spec: CreditSpec, block_pool: BlockPool, **options: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **options)
        assert not self.enable_caching
        self.spec = kv_cache_spec
        self.blocks = block_pool.get_num_free_blocks()
        self.accounts = Accounts(
            heads=kv_cache_spec.num_kv_heads,
            page_size=kv_cache_spec.block_size,
            rows=kv_cache_spec.rows,
            workers=kv_cache_spec.workers,
        )
        self.waits = 0
        """Times that a request that ran found too few credits, so that one was preempted."""
        _MANAGERS[id(block_pool)] = self

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **options: Any
    ) -> int:
        """Credits that the request lacks. For admission (the cap): what it is expected to take in all.

        Raises RuntimeError where a request alone needs more than there is, which only a trusted ratio allows.
        """
        if apply_admission_cap:
            return min(self.blocks, -(-expected_tokens(self.spec, num_tokens) // self.spec.block_size) + 1)
        lacking = self.accounts.lacks(request_id, num_tokens)
        if lacking is None:
            return NEVER
        if lacking > self.block_pool.get_num_free_blocks() and request_id in self.accounts:
            if len(self.accounts) == 1 and self.accounts.needs(request_id, num_tokens) > self.blocks:
                raise RuntimeError(
                    f"a request of {num_tokens} tokens needs more than the whole KV cache: it compresses less than "
                    f"trusted_ratio {self.spec.trusted_ratio:g}; lower trusted_ratio or --max-model-len"
                )
            self.waits += 1
        return lacking

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **options: Any) -> list[KVCacheBlock]:
        """Take the credits; the first time, show the row."""
        lacking = self.accounts.lacks(request_id, num_tokens)
        assert lacking is not None
        new: list[KVCacheBlock] = []
        if request_id not in self.accounts:
            new = [KVCacheBlock(block_id=self.accounts.enter(request_id) + 1, ref_cnt=1)]
            self.req_to_blocks[request_id] = new
        self.accounts.schedule(request_id, num_tokens, self.block_pool.get_new_blocks(lacking) if lacking else [])
        return list(new)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Finished, aborted or preempted: its credits, for vLLM to free."""
        self.req_to_blocks.pop(request_id, None)
        return self.accounts.leave(request_id)

    def settle(self, worker: int, report: Report) -> None:
        """Give back the credits that a report shows not to be needed."""
        surplus = self.accounts.settle(worker, report)
        if surplus:
            self.block_pool.free_blocks(surplus)

    def cache_blocks(self, *args: Any, **options: Any) -> None:
        """Nothing is cached for other requests."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No two requests share a row."""
        return 0

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **options: Any) -> Any:
        """Prefix caching is refused at start-up."""
        raise AssertionError("prefix caching is off")
