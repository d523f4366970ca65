"""Chunks of prompts as CUDA graphs, one for each number of tokens in SIZES, recorded when first used.

An eager forward of a few hundred tokens is bound by its launches: some forty a layer, about a millisecond. A step
smaller than its graph is padded by tokens of one more sequence of row -1, which the operations skip. Larger steps keep
the device busy for longer than the host needs to launch them, and run as they are.

These graphs have memory of their own: in a step they run between the decodes' graph and the sampler, and a decode graph
recorded after them would write its logits where they keep what they are computing.
"""

from typing import Any

import torch
from torch import Tensor

from sparsekv.attend import Part
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.recording import record
from sparsekv.engine.device.regions import CompiledForward
from sparsekv.ops.layout import Batch

SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a step."""
SEQUENCES = 16
"""Chunks of a step at most, the padding's among them."""


class PaddedChunks:
    """Static buffers that hold a step of chunks, padded. max_tokens: of any sequence."""

    def __init__(self, device: torch.device, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.ids = torch.zeros(1, SIZES[-1], dtype=torch.int64, device=device)
        self.positions = torch.zeros(1, SIZES[-1], dtype=torch.int64, device=device)
        self.rows = torch.full((SEQUENCES,), -1, dtype=torch.int64, device=device)
        self.starts = torch.zeros(SEQUENCES + 1, dtype=torch.int32, device=device)
        self.seen = torch.zeros(SEQUENCES, dtype=torch.int32, device=device)
        self.keep = torch.zeros(SEQUENCES, dtype=torch.int64, device=device)

    def empty(self, size: int) -> None:
        """A step of `size` tokens that belong to no row."""
        self.rows.fill_(-1)
        self.starts.fill_(size)
        self.starts[:1] = 0
        self.keep.zero_()  # of a longer step they would lie beyond this one

    def fill(self, part: Part, ids: Tensor, positions: Tensor, keep: Tensor, *, size: int) -> None:
        """part: B < SEQUENCES chunks; ids, positions: int64 [T], T <= size; keep: int64 [n], n < SEQUENCES."""
        tokens, chunks = part.tokens, len(part.batch.rows)
        self.ids[0, :tokens] = ids
        self.positions[0, :tokens] = positions
        self.empty(size)
        self.rows[:chunks] = part.batch.rows
        self.starts[: chunks + 1] = part.batch.starts
        self.seen[:chunks] = part.seen
        self.keep[: len(keep)] = keep

    def forward_of(self, size: int) -> tuple[Part, Tensor, Tensor, Tensor]:
        """The part, token ids and positions [1, size], and which logits are wanted [SEQUENCES]."""
        batch = Batch(rows=self.rows, starts=self.starts, longest=size)
        part = Part(batch=batch, seen=self.seen, tokens=size, most=self.max_tokens)
        return part, self.ids[:, :size], self.positions[:, :size], self.keep


class ChunkGraphs:
    """forward: of compiled_decode; pool: of torch.cuda.graph_pool_handle, not the decodes'; max_tokens: of any
    sequence."""

    def __init__(self, forward: CompiledForward, cache: EngineCache, *, pool: Any, max_tokens: int) -> None:
        self.cache = cache
        self.forward = forward
        self._buffers = PaddedChunks(cache.ragged.lengths.device, max_tokens=max_tokens)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = pool

    def run(self, part: Part, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor | None:
        """ids, positions: int64 [T]; keep: int64 [n]. Logits [n, vocab] of the tokens kept, valid until the next run;
        None where so many tokens or chunks have no graph."""
        if part.tokens > SIZES[-1] or max(len(part.batch.rows), len(keep)) >= SEQUENCES:
            return None
        size = next(size for size in SIZES if size >= part.tokens)
        if size not in self._graphs:
            self._graphs[size] = self._record(size)
        self._buffers.fill(part, ids, positions, keep, size=size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(keep)]

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._buffers.empty(size)  # the warm-ups run for real
        part, ids, positions, keep = self._buffers.forward_of(size)
        self.cache.parts = (None, part)
        return record(lambda: self.forward(ids, positions, keep), pool=self._pool, what=f"{size} tokens of prompts")
