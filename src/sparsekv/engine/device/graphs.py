"""Decode steps as CUDA graphs of the compiled, unmodified model, one for each batch bucket, recorded when first used.

A graph reads static buffers: token ids, positions and rows. A step smaller than its bucket is padded with row -1, which
the kernels skip. Lengths, page tables and the offset live in tensors that never move, so nothing is ever re-recorded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsekv.attend import Part
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.merge import lay_end_to_end, merge
from sparsekv.engine.device.products import with_own_products
from sparsekv.engine.device.recording import record
from sparsekv.engine.device.regions import CompiledForward
from sparsekv.ops.layout import Batch
from sparsekv.ops.linear import workspace_for
from sparsekv.policies import Policy

INDUCTOR = {"combo_kernels": True, "triton.enable_pdl": True}
"""Kernels that do not depend on each other become one (norms and RoPE of q and of k), and kernels start before those in
front have ended (programmatic dependent launch, where the device has it)."""


def buckets_up_to(rows: int) -> list[int]:
    """2, 4, 8, 16, 32, 48, 64, 96, ..., about a quarter apart, and rows itself: a padded place costs little, and a
    recording some tenths of a second."""
    sizes = [2, 4, 8, 16, 32, 48, 64]
    while sizes[-1] < rows:
        sizes.append(sizes[-1] + max(32, 2 ** (sizes[-1].bit_length() - 3)))
    return [*(size for size in sizes if size < rows), rows]


def why_not_recordable(policies: Sequence[Policy]) -> str | None:
    """The reason why decode steps of these policies cannot be recorded, or None."""
    for policy in policies:
        if not policy.recordable:
            return f"the decode step of policy {policy.name!r} asks the device while it runs"
    return None


class DecodeGraphs:
    """forward: of compiled_decode; sizes: batches that may be recorded, such as buckets_up_to(rows); max_tokens: of any
    sequence. The largest is recorded on construction, so that what it takes is compiled and allocated by then."""

    def __init__(self, forward: CompiledForward, cache: EngineCache, *, sizes: list[int], max_tokens: int) -> None:
        rows, device = max(sizes), cache.ragged.lengths.device
        self.cache = cache
        self.max_tokens = max_tokens
        self.ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(1, rows, dtype=torch.int64, device=device)
        self.rows = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, dtype=torch.int32, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._sizes = sorted(sizes)
        self._graphs[rows] = self._record(rows)

    def run(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """ids, rows, positions: int64 [n] on the device. Returns logits [n, vocab], valid until the next run."""
        count = ids.shape[0]
        size = next(size for size in self._sizes if size >= count)
        if size not in self._graphs:
            self._graphs[size] = self._record(size)
        self.ids[0, :count] = ids
        self.positions[0, :count] = positions
        self.seen[:count] = positions
        self.rows[:count] = rows
        self.rows[count:size] = -1
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.rows.fill_(-1)  # the warm-ups run for real
        self.cache.parts = (self._part(size), None)
        ids, positions = self.ids[:, :size], self.positions[:, :size]
        return record(lambda: self.forward(ids, positions), pool=self._pool, what=f"decodes of {size} sequences")

    def _part(self, size: int) -> Part:
        batch = Batch(rows=self.rows[:size], starts=self.starts[: size + 1], longest=1)
        return Part(batch=batch, seen=self.seen[:size], tokens=size, most=self.max_tokens)


def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor on a graph with merged projections and our own matrix products; a torch.compile backend."""
    from torch._inductor.compile_fx import compile_fx  # more than a second, which a CPU's engine need not wait

    return compile_fx(with_own_products(merge(graph, inputs)), inputs, config_patches=INDUCTOR)


def compiled_decode(model: Any, cache: EngineCache, *, backend: Any = backend) -> CompiledForward:
    """The model's forward in compiled pieces, over rows of the cache. backend: torch.compile's."""
    lay_end_to_end(model)
    return CompiledForward(model, cache, workspace=workspace_for(cache.ragged.lengths.device), backend=backend)
