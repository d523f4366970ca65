"""A worker's rows: page tables, lengths and rings, made before vLLM profiles memory; pages, once it has given them.

Nothing here waits for the device. What rows hold is summed up on the device at the end of a step and copied to pinned
memory; the newest copy that has arrived is the worker's report.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekv.attend import Executor, Part
from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.integrations.vllm.scheduler.accounts import Report
from sparsekv.integrations.vllm.worker.buffers import StepBuffers
from sparsekv.ops.layout import PoolExhausted
from sparsekv.ops.tally import tally
from sparsekv.ops.transfer import download, upload
from sparsekv.policies import Policy

SHORTAGE = (
    "the KV pages ran short: sparsekv's account of pages is wrong, tokens would be missing, and so this engine stops; "
    "please report it with the arguments you ran"
)


class Rows:
    """policies: by layer of this worker; kv_heads: of this worker, in each layer; rows: requests at once; max_tokens:
    of any request; step_tokens: of a step at most."""

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        rows: int,
        max_tokens: int,
        step_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        none = PagePool(0, page_size=page_size, head_dim=head_dim, dtype=dtype, device=device)
        windows = [policy.window(layer) for layer, policy in enumerate(policies)]
        self.cache = RaggedCache(none, windows, kv_heads=kv_heads, rows=rows, max_tokens=max_tokens)
        self.executor = Executor(self.cache, policies, count_reads=False)
        self.buffers = StepBuffers(requests=rows, places=max(rows, step_tokens), max_tokens=max_tokens, device=device)
        self.device = device
        self._dtype = dtype
        self._copies: deque[tuple[int, Tensor, Any]] = deque()
        """(step, table on the host, event or None), the oldest first."""

    @property
    def ready(self) -> bool:
        """Whether there are pages yet. Profiling and the estimate of graphs come before."""
        return self.cache.pool.pages > 0

    def take(self, memory: Tensor) -> None:
        """vLLM's tensor, of any shape, becomes the pool."""
        pool = self.cache.pool
        page = 2 * pool.page_size * pool.kv.shape[-1]
        flat = torch.empty(0, dtype=self._dtype, device=memory.device).set_(memory.untyped_storage())
        pages = flat[: len(flat) // page * page].view(-1, *pool.kv.shape[1:])
        self.cache.pool = PagePool(
            len(pages),
            page_size=pool.page_size,
            head_dim=pool.kv.shape[-1],
            dtype=self._dtype,
            device=self.device,
            kv=pages,
        )
        self.release([0])  # empty: the kernels are compiled now, not while the first request waits
        self._tally()

    def attend(self, layer: int, parts: Sequence[Part], tokens: Sequence[Tensor], scale: float) -> Tensor:
        """parts: of the step, which follow each other; tokens: as in Executor.run, of all parts, then of padding.
        Returns [T, H * G, D]. Raises RuntimeError where pages run short and the device can say so."""
        outs, first = list[Tensor](), 0
        for part in parts:
            mine = slice(first, first + part.tokens)
            outs.append(self._run(layer, part, [x[mine] for x in tokens], scale))
            first += part.tokens
        query = tokens[1]
        if first < len(query):
            outs.append(torch.zeros_like(query[first:]))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_recorded(self, layer: int, tokens: Sequence[Tensor], scale: float) -> Tensor:
        """The same for what `buffers` hold when this runs: a graph may record it."""
        decodes, chunks = self.buffers.recorded(len(tokens[0]))
        single = self._run(layer, decodes, [x[: decodes.tokens] for x in tokens], scale)
        out = self._run(layer, chunks, tokens, scale)
        real = (decodes.batch.rows >= 0)[:, None, None]
        out[: decodes.tokens] = torch.where(real, single, out[: decodes.tokens])
        return out

    def _run(self, layer: int, part: Part, tokens: Sequence[Tensor], scale: float) -> Tensor:
        try:
            return self.executor.run(layer, part, tokens, scale)
        except PoolExhausted as error:
            raise RuntimeError(f"{error}; {SHORTAGE}") from error

    def release(self, rows: list[int]) -> None:
        """Free rows that requests have left, before anything else of the step."""
        if rows:
            self.cache.release(upload(rows, torch.int64, self.device))

    def snapshot(self, step: int) -> None:
        """`step` is over: start to copy what rows hold."""
        self.buffers.empty()
        table = self._tally()
        host, event = download(table), None
        if table.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._copies.append((step, host, event))

    def _tally(self) -> Tensor:
        pool = self.cache.pool
        return tally(self.cache.lengths, self.cache.seen, pool.free_count, page_size=pool.page_size)

    def report(self) -> Report | None:
        """The newest copy that has arrived, if there is one since the last call.

        Raises RuntimeError where a step found too few pages: tokens are missing then, so the engine must not go on.
        """
        newest = None
        while self._copies and (self._copies[0][2] is None or self._copies[0][2].query()):
            step, host, _ = self._copies.popleft()
            newest = Report(step=step, table=host[:-1].numpy())
            free = int(host[-1, 0])
            if free < 0:
                raise RuntimeError(f"{-free} pages are missing after step {step}; {SHORTAGE}")
        return newest
