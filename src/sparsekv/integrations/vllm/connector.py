"""SparseConnector: vLLM's own two-way street between scheduler and workers. Rows to free go out with each step, what
rows hold comes back. It moves no keys and values.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from sparsekv.integrations.vllm.scheduler.accounts import Report
from sparsekv.integrations.vllm.scheduler.manager import CreditManager, manager_of
from sparsekv.integrations.vllm.scheduler.stats import PREEMPTIONS, SparseProm, SparseStats
from sparsekv.integrations.vllm.worker.layer import SparseAttention
from sparsekv.integrations.vllm.worker.rows import Rows

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


@dataclass
class StepOrders(KVConnectorMetadata):
    """What the workers hear before a step."""

    step: int
    released: list[int] = field(default_factory=list)
    """Rows to empty first."""


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """What workers say after a step, by worker."""

    reports: dict[int, Report]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReports":
        """Those of both."""
        assert isinstance(other, StepReports)
        return StepReports(self.reports | other.reports)


class SparseConnector(KVConnectorBase_V1):
    """On the scheduler's side it holds the manager, on a worker's the rows."""

    _manager: CreditManager
    _rows: Rows
    _worker: int
    _step: int = 0
    _waits: int = 0
    """As last told in stats."""

    # Scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        """vLLM shows its connector the block pool; the manager has the same."""
        self._manager = manager_of(gpu_block_pool)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        """With every step."""
        step, released = self._manager.accounts.next_step()
        return StepOrders(step=step, released=released)

    def update_connector_output(self, connector_output: Any) -> None:
        """Reports arrive: credits go back."""
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, StepReports):
            for worker, report in found.reports.items():
                self._manager.settle(worker, report)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded from elsewhere."""

    def get_kv_connector_stats(self) -> SparseStats | None:
        """After each step, on both sides; the scheduler's knows."""
        if self.role != KVConnectorRole.SCHEDULER:
            return None
        new, self._waits = self._manager.waits - self._waits, self._manager.waits
        return SparseStats(data={**self._manager.accounts.totals(), PREEMPTIONS: new})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SparseStats:
        """As they arrive at vLLM's log."""
        return SparseStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> SparseProm:
        """For Prometheus."""
        return SparseProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has allocated the one tensor of all layers."""
        layers = self._vllm_config.compilation_config.static_forward_context
        governed = [layers[name] for name in kv_caches]
        assert all(isinstance(layer, SparseAttention) for layer in governed)
        assert len({cache.data_ptr() for cache in kv_caches.values()}) == 1, "the layers of a worker share one tensor"
        self._rows = governed[0].sparsekv.rows
        self._rows.take(next(iter(kv_caches.values())))
        size = get_tensor_model_parallel_world_size()
        self._worker = get_pp_group().rank_in_group * size + get_tensor_model_parallel_rank()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward, in every version and model runner: free what was released."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepOrders)
        self._step = connector_metadata.step
        self._rows.release(connector_metadata.released)

    def build_connector_worker_meta(self) -> StepReports | None:
        """After the forward."""
        self._rows.snapshot(self._step)
        report = self._rows.report()
        return None if report is None else StepReports({self._worker: report})

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
