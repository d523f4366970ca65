"""The layers of forwards over one ragged cache: the walk that SparseCache, the engine and the vLLM plugin share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.attend.layer import decode_layer, finish_prompts, prefill_layer
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.layout import Batch
from sparsekv.policies.base import Policy, Prompt, Reading, Step


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows' tokens in a packed forward: a decode step (batch.longest is 1) or chunks of prompts."""

    batch: Batch
    seen: Tensor
    """int32 [B]: tokens of each sequence before the forward."""
    tokens: int
    """T of this part."""
    most: int
    """At least the tokens that any of these sequences has after the forward."""


class Executor:
    """ragged: the rows; policies: by layer. count_reads: keep account of what decode steps read on the device; without
    it they read what they hold, which lengths tell."""

    def __init__(self, ragged: RaggedCache, policies: Sequence[Policy], *, count_reads: bool) -> None:
        self.ragged = ragged
        self.policies = policies
        self.reads: Tensor | None = None
        """int64 [2, N, R + 1, H]: tokens, and pages whose bounds were read, by each row's decode steps."""
        self._scales = [1.0] * len(policies)
        if count_reads:
            self.forget_reads()

    def reset(self) -> None:
        """Count anew: the rows have been emptied."""
        if self.reads is not None:
            self.reads.zero_()

    def forget_reads(self) -> None:
        """Count anew, for the rows that there are now."""
        layers, rows, heads = self.ragged.lengths.shape
        self.reads = torch.zeros(2, layers, rows + 1, heads, dtype=torch.int64, device=self.ragged.lengths.device)

    def select(self, indices: Tensor) -> Tensor | None:
        """As RaggedCache.select; returns total_reads until then and counts anew."""
        self.ragged.select(indices)
        before = None if self.reads is None else self.total_reads()
        if before is not None:
            self.forget_reads()
        return before

    def total_reads(self) -> Tensor:
        """int64 [2, N, H]: over all rows."""
        assert self.reads is not None
        return self.reads[:, :, :-1].sum(2)

    def run(self, layer: int, part: Part, tokens: Sequence[Tensor], scale: float) -> Tensor:
        """One layer over one part: [T, H * G, D]. tokens: hidden [T, any], query, key and value as in Step.

        Raises PoolExhausted where the pool has too few pages (from kernels: never, see ops.place).
        """
        policy, pages, rows = self.policies[layer], self.ragged.layer(layer), part.batch.rows
        hidden, query, key, value = tokens
        decoding = part.batch.longest == 1
        most = part.most
        if decoding or not policy.prunes:
            most = min(most, policy.most_held(layer, prompt=0, tokens=part.most))
        step = Step(
            layer=layer,
            batch=part.batch,
            hidden=hidden,
            query=query,
            key=key,
            value=value,
            seen=part.seen,
            scale=scale,
            most=most,
            samples=self.ragged.samples[rows],
            state=self.ragged.state(layer),
        )
        if not decoding:
            self._scales[layer] = scale
            return prefill_layer(policy, step, pages)
        out, reading = decode_layer(policy, step, pages)
        if self.reads is not None:
            self._count(layer, rows, reading)
        return out

    def finish_prompts(self, rows: Tensor, most: int) -> None:
        """The prompts of rows (int64 [n], distinct) are over, in all layers. most: at least the tokens of any."""
        for layer, policy in enumerate(self.policies):
            if policy.prunes:
                prompt = Prompt(
                    layer=layer,
                    rows=rows,
                    scale=self._scales[layer],
                    most=most,
                    samples=self.ragged.samples[rows],
                    state=self.ragged.state(layer),
                )
                finish_prompts(policy, prompt, self.ragged)

    def _count(self, layer: int, rows: Tensor, reading: Reading | None) -> None:
        """Rows of -1 count in the spare place."""
        assert self.reads is not None
        reads = self.reads[:, layer]
        if reading is None:
            reads[0, rows] += self.ragged.lengths[layer][rows]
        else:
            reads[0, rows] += reading.pages.lengths
            reads[1, rows] += reading.bounds
