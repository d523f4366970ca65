"""A policy on a bare cache, turn by turn, beside its oracle: outputs, what is held slot by slot, and what is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import check_pages
from oracles import Dense
from sparsekv.attend import Executor, Part, allocate
from sparsekv.cache.state import HeadShape
from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import batch_of
from sparsekv.policies import Policy

LAYER = 2
"""The layer that runs: Quest reads the first two densely."""
HEADS, GROUP, DIM = 2, 2, 4


@dataclass(kw_only=True)
class Driven:
    """`rows` sequences of one layer, in float64. inputs: query, key, value and hidden of each, [tokens, ...]."""

    policy: Policy
    inputs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
    page_size: int = 2
    pages: int = 600
    executor: Executor = field(init=False)
    placed: list[int] = field(init=False)

    def __post_init__(self) -> None:
        rows = len(self.inputs)
        shape = HeadShape(kv_heads=HEADS, group=GROUP, dim=DIM, dtype=torch.float64)
        policies = [*[Policy()] * LAYER, self.policy]
        options: dict[str, Any] = {"pages": self.pages, "page_size": self.page_size, "rows": rows, "device": "cpu"}
        self.executor = Executor(allocate(policies, shape, max_tokens=120, **options), policies, count_reads=True)
        self.placed = [0] * rows

    def run(self, counts: Sequence[int]) -> list[Tensor]:
        """The next counts[row] tokens of each row, a decode step where all are 1: the outputs of each row."""
        parts = [
            [x[start : start + count] for x in inputs]
            for inputs, start, count in zip(self.inputs, self.placed, counts, strict=True)
        ]
        query, key, value, hidden = (torch.cat(x) for x in zip(*parts, strict=True))
        batch = batch_of(torch.arange(len(counts)), list(counts))
        seen = torch.tensor(self.placed, dtype=torch.int32)
        self.placed = [start + count for start, count in zip(self.placed, counts, strict=True)]
        part = Part(batch=batch, seen=seen, tokens=sum(counts), most=max(self.placed))
        out = self.executor.run(LAYER, part, [hidden, query, key, value], DIM**-0.5)
        return list(out.split(list(counts)))

    def prompt(self, counts: Sequence[int], cuts: Sequence[int]) -> list[Tensor]:
        """A prompt of counts[row] tokens of each row, in chunks that end at `cuts` (tokens of the longest prompt)."""
        outs: list[list[Tensor]] = [[] for _ in counts]
        done = [0] * len(counts)
        for cut in [*cuts, max(counts)]:
            step = [min(cut, count) - before for count, before in zip(counts, done, strict=True)]
            step = [max(n, 0) for n in step]
            if sum(step) == 0:
                continue
            done = [before + n for before, n in zip(done, step, strict=True)]
            # batch_of takes a chunk of one token of every row for a decode step, which it is not here
            for row, out in enumerate(self._chunk(step)):
                outs[row].append(out)
        self.executor.finish_prompts(torch.arange(len(counts)), max(self.placed))
        return [torch.cat(out) for out in outs]

    def _chunk(self, step: Sequence[int]) -> list[Tensor]:
        if max(step) > 1 or 0 in step:
            return self.run(step)
        first = self.run([1, *[0] * (len(step) - 1)])[0] if len(step) > 1 else None
        assert first is not None, "a lone row cannot have a chunk of one token"
        rest = self.run([0, *[1] * (len(step) - 1)])[1:]
        return [first, *rest]

    def held(self, row: int, head: int) -> list[int]:
        """The positions of what a head holds, in slot order."""
        layer = self.executor.ragged.layer(LAYER)
        keys, _ = gather_slots(layer, row, layer.lengths[row].tolist())[head]
        own = self.inputs[row][1][: self.placed[row], head]
        return [int((own == key).all(-1).nonzero()[0, 0]) for key in keys]

    def reads(self, row: int) -> list[int]:
        """Tokens read so far by each head."""
        assert self.executor.reads is not None
        return self.executor.reads[0, LAYER, row].tolist()

    def bounds(self, row: int) -> list[int]:
        assert self.executor.reads is not None
        return self.executor.reads[1, LAYER, row].tolist()


def agree(driven: Driven, oracle: Dense, row: int, *, in_order: bool = True) -> None:
    """What the cache holds is what the oracle holds, slot by slot."""
    for head in range(HEADS):
        mine, theirs = driven.held(row, head), oracle.held()[head]
        assert (mine == theirs) if in_order else (sorted(mine) == sorted(theirs)), (row, head)
    check_pages(driven.executor.ragged)
