"""What the cache holds, among vLLM's own metrics: in its log, and for Prometheus as vllm:sparsekv_*."""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

GAUGES = {
    "requests": "Requests that have a row.",
    "tokens_seen": "Tokens of running requests that went into the cache.",
    "tokens_held": "Tokens of running requests that the cache holds, averaged over layers and KV heads.",
    "pages": "Pages of running requests, on the fullest worker.",
    "credits": "Blocks that running requests hold, for what they have and may take next.",
}
PREEMPTIONS = "preemptions"


@dataclass
class SparseStats(KVConnectorStats):
    """data: GAUGES by name, as they are now, and the preemptions since the last time, for want of pages."""

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The later gauges, and the sum of preemptions."""
        preemptions = sum(stats.data.get(PREEMPTIONS, 0) for stats in (self, other))
        return SparseStats(data=self.data | other.data | {PREEMPTIONS: preemptions})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        found = dict(self.data)
        if found.get("tokens_held"):
            found["ratio"] = round(found["tokens_seen"] / found["tokens_held"], 2)
            found["tokens_held"] = round(found["tokens_held"], 1)
        return found


class SparseProm(KVConnectorPromMetrics):
    """The same for Prometheus, by engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = {"labelnames": labelnames}
        self._gauges: dict[str, Any] = {
            name: self._gauge_cls(name=f"vllm:sparsekv_{name}", documentation=about, **make)
            for name, about in GAUGES.items()
        }
        about = "Times that a request was preempted because the pages ran short."
        self._preemptions: Any = self._counter_cls(name="vllm:sparsekv_preemptions", documentation=about, **make)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, gauge in self._gauges.items():
            gauge.labels(*labels).set(transfer_stats_data[name])
        self._preemptions.labels(*labels).inc(transfer_stats_data[PREEMPTIONS])
