"""Decode steps as CUDA graphs of the compiled, unmodified model, one for each batch bucket.

A graph reads static buffers: token ids, positions and rows. A step smaller than its bucket is padded with row -1, which
the kernels skip. Lengths, page tables and the offset live in tensors that never move, so nothing is ever re-recorded.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx

from sparsekv.attend import Part
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.merge import lay_end_to_end, merge
from sparsekv.engine.device.products import with_own_products
from sparsekv.ops.layout import Batch
from sparsekv.ops.linear import workspace_for
from sparsekv.policies import Policy

log = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before recording: compilation, and kernels' own first-time work."""

INDUCTOR = {"combo_kernels": True, "triton.enable_pdl": True}
"""Kernels that do not depend on each other become one (norms and RoPE of q and of k), and kernels start before those in
front have ended (programmatic dependent launch, where the device has it)."""

Forward = Callable[[Tensor, Tensor], Tensor]
"""(ids int64 [1, T], positions int64 [1, T]) -> logits [T, vocab]."""


def buckets_up_to(rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and rows itself."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, rows + 1, 16)]
    return [*(size for size in sizes if size < rows), rows]


def why_not_recordable(policies: Sequence[Policy]) -> str | None:
    """The reason why decode steps of these policies cannot be recorded, or None."""
    for policy in policies:
        if not policy.recordable:
            return f"the decode step of policy {policy.name!r} asks the device while it runs"
    return None


class DecodeGraphs:
    """Records on construction. forward: see compiled_decode; sizes: batches to record, such as buckets_up_to(rows);
    max_tokens: of any sequence."""

    def __init__(self, forward: Forward, cache: EngineCache, *, sizes: list[int], max_tokens: int) -> None:
        rows, device = max(sizes), cache.ragged.lengths.device
        self.cache = cache
        self.max_tokens = max_tokens
        self.ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(1, rows, dtype=torch.int64, device=device)
        self.rows = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, dtype=torch.int32, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        self._sizes = sorted(sizes)
        for size in reversed(self._sizes):
            self._graphs[size] = self._record(size, pool)
        log.info("recorded decode graphs for batches of %s", self._sizes)

    def run(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """ids, rows, positions: int64 [n] on the device. Returns logits [n, vocab], valid until the next run."""
        count = ids.shape[0]
        size = next(size for size in self._sizes if size >= count)
        self.ids[0, :count] = ids
        self.positions[0, :count] = positions
        self.seen[:count] = positions
        self.rows[:count] = rows
        self.rows[count:size] = -1
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _record(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.cache.parts = (self._part(size), None)
        ids, positions = self.ids[:, :size], self.positions[:, :size]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(ids, positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._forward(ids, positions)
        return graph, logits

    def _part(self, size: int) -> Part:
        batch = Batch(rows=self.rows[:size], starts=self.starts[: size + 1], longest=1)
        return Part(batch=batch, seen=self.seen[:size], tokens=size, most=self.max_tokens)


def decode_backend(device: torch.device) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """A torch.compile backend: inductor on a graph with merged projections and our own matrix products."""
    workspace = workspace_for(device)

    def compile(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(with_own_products(merge(graph, inputs), workspace), inputs, config_patches=INDUCTOR)

    return compile


def compiled_decode(model: Any, cache: EngineCache, *, backend: Any = None) -> Forward:
    """The model's forward, compiled whole. One compilation serves all buckets above 1: their size is dynamic.

    backend: torch.compile's; None takes decode_backend.
    """
    lay_end_to_end(model)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]

    compiled = torch.compile(forward, fullgraph=True, backend=backend or decode_backend(cache.ragged.lengths.device))

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            torch._dynamo.mark_dynamic(ids, 1)
            torch._dynamo.mark_dynamic(positions, 1)
        return compiled(ids, positions)

    return run
