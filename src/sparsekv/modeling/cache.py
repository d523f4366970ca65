"""SparseCache: the transformers.Cache face of the ragged cache, for plain `generate` and any forward.

One row per sequence of the batch. Each layer's keys and values go from the attention function to the policy's slots;
the Cache methods that `generate` calls only count columns. A forward that the pool cannot hold leaves the cache as it
was; a prefill that another error, or Ctrl-C, interrupts is taken back when the next forward begins. What cannot be
taken back, a decode step, the end of a prompt or a fork, leaves a cache that says so until `reset`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.attend import Executor, Part, allocate, choose_page_size, page_bytes
from sparsekv.cache.pages import human_bytes, parse_bytes
from sparsekv.cache.ragged import RaggedCache
from sparsekv.cache.rollback import Rollback
from sparsekv.cache.stats import KVStats
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.attached import AttachedLayer, PagedCache
from sparsekv.modeling.padding import Packing, packing_of
from sparsekv.ops.device import free_memory
from sparsekv.ops.layout import PoolExhausted

SHARE_OF_FREE_MEMORY = 0.5
"""The largest part of the free memory that a pool takes when kv_memory is not given."""


@dataclass(kw_only=True)
class _Forward:
    """The forward under way."""

    packing: Packing
    part: Part
    next_layer: int
    rollback: Rollback | None
    """None in a decode step, whose need for pages is known before anything is written."""


class SparseCache(PagedCache):
    """A KV cache in which the policy of an attached model forgets, in real memory.

    model: an attached model (sparsekv.attach). kv_memory: the pool's size, in bytes or as "2GiB"; without it the pool
    can hold max_tokens tokens of every row densely, without that the model's whole context, but takes at most half of
    the free memory (on the CPU pages that are never used cost nothing). page_size: slots per page; without it what the
    policy needs, else 32.

    Raises ValueError for a model that is not attached, a bad size, or, in a forward, when the pool is full (naming the
    bytes needed; the cache stays usable) or the text exceeds the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_memory: int | str | None = None,
        max_tokens: int | None = None,
        page_size: int | None = None,
    ) -> None:
        if page_size is not None and (type(page_size) is not int or page_size < 1):
            raise ValueError(f"page_size is {page_size}; it counts token slots, so use an integer from 1 (32 is usual)")
        self.attachment = attachment_of(model)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens is {max_tokens}; it counts the tokens of a row, so use an integer from 1")
        self._kv_memory = None if kv_memory is None else parse_bytes(kv_memory)
        self._max_tokens = self.attachment.max_tokens if max_tokens is None else max_tokens
        self._policies = [attached.policy for attached in self.attachment.layers]
        self._page_size = choose_page_size(self._policies, page_size)
        self._executor: Executor | None = None
        self._forward: _Forward | None = None
        self._torn: str | None = None
        """What is under way, or was interrupted, that cannot be taken back."""
        self._prompts = set[int]()
        """Rows whose prompt is not known to be over."""
        self._earlier_reads = torch.zeros(())
        """int64 [2, N, H]: what rows read before they were last selected."""
        self._peak = torch.zeros((), dtype=torch.int64)
        super().__init__(len(self.attachment.layers))

    @property
    def ragged(self) -> RaggedCache:
        """The page tables and the pool. Raises ValueError before the first forward, which decides their size."""
        return self._running.ragged

    @property
    def _running(self) -> Executor:
        if self._executor is None:
            raise ValueError("the cache is empty: run a forward with past_key_values=cache first")
        return self._executor

    # What the attention function calls

    def attend(
        self,
        attached: AttachedLayer,
        hidden: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """One layer of a forward. hidden: [B, S, hidden_size]; q: [B, H * G, S, D]; k, v: [B, H, S, D]; mask: bool
        [B, columns + S] or None. Returns [B, S, H * G, D]."""
        if attached.attachment is not self.attachment:
            raise ValueError("this cache was made for another model or policy: make a new SparseCache(model)")
        if attached.layer == 0:
            self._begin(qkv[1], mask)
        forward = self._forward
        assert forward is not None and forward.next_layer == attached.layer, "layers must run in order"
        packing, executor = forward.packing, self._running
        tokens = [packing.pack_tokens(hidden), *(packing.pack(x) for x in qkv)]
        if forward.rollback is None:
            self._torn = "a decode step"
            out = executor.run(attached.layer, forward.part, tokens, scale)
        else:
            forward.rollback.remember(attached.layer, packing.batch)
            try:
                out = executor.run(attached.layer, forward.part, tokens, scale)
            except PoolExhausted as shortage:
                taken = self._undo()
                raise ValueError(self.ragged.pool.shortage(taken + shortage.needed)) from None
        forward.next_layer += 1
        if forward.next_layer == len(self._policies):
            self._end(forward, qkv[1].shape[2])
        return packing.unpack(out)

    # A forward, from its first layer to its last

    def _begin(self, key: Tensor, mask: Tensor | None) -> None:
        rows, _, length, _ = key.shape
        self._undo()
        if self.columns + length > self.attachment.max_tokens:
            raise ValueError(
                f"{self.columns + length} tokens exceed the model's context of {self.attachment.max_tokens}; "
                "shorten the text or generate fewer tokens"
            )
        if self._executor is None:
            self._executor = Executor(self._allocate(key, rows, length), self._policies, count_reads=True)
        ragged = self._executor.ragged
        if rows != ragged.rows:
            raise ValueError(f"the cache holds {ragged.rows} sequences and the batch has {rows}; use a new SparseCache")
        packing = packing_of((rows, length), None if mask is None else mask[:, -length:].bool(), key.device)
        ragged.grow(self.columns + length)
        decoding = packing.batch.longest == 1
        if decoding:
            self._finish_prompts()
            self._check_room(ragged)
        part = Part(
            batch=packing.batch,
            seen=ragged.seen[0, packing.batch.rows],
            tokens=packing.tokens,
            most=self.columns + length,
        )
        rollback = None if decoding else Rollback(ragged)
        self._forward = _Forward(packing=packing, part=part, next_layer=0, rollback=rollback)

    def _end(self, forward: _Forward, length: int) -> None:
        """Raises ValueError where kernels, which cannot raise, found too few pages; the forward is taken back."""
        if forward.rollback is not None and self.ragged.pool.pages_free < 0:
            raise ValueError(self.ragged.pool.shortage(self._undo()))
        prompts = self._prompts if forward.rollback is None else self._prompts | set(forward.packing.filled)
        held = self.ragged.lengths.sum()
        peak = torch.maximum(self._peak.to(held.device), held)
        # In one statement, between whose stores no interrupt comes: the forward has happened or it has not.
        self._prompts, self._peak, self.columns, self._forward, self._torn = (
            prompts,
            peak,
            self.columns + length,
            None,
            None,
        )

    def _finish_prompts(self) -> None:
        """A single token comes: the chunk before it was its prompt's last."""
        if self._prompts and any(policy.prunes for policy in self._policies):
            rows = torch.tensor(sorted(self._prompts), device=self.ragged.lengths.device)
            self._torn = "the end of a prompt"
            self._running.finish_prompts(rows, self.columns)
        self._prompts, self._torn = set(), None

    def _undo(self) -> int:
        """Take back the forward under way, if any; returns the pages it had taken."""
        if self._torn is not None:
            raise ValueError(f"{self._torn} was interrupted half-way; call cache.reset() and prefill again")
        forward, taken = self._forward, 0
        if forward is not None and forward.rollback is not None:
            taken = forward.rollback.restore()
        self._forward = None
        return taken

    def _check_room(self, ragged: RaggedCache) -> None:
        """Refuse a decode step for which the pool has too few pages, before anything is written."""
        size, free = ragged.pool.page_size, ragged.pool.pages_free
        if free >= ragged.lengths.numel():
            return
        needed = 0
        for attached in self.attachment.layers:
            pages = ragged.layer(attached.layer)
            needed += int(((pages.lengths % size == 0) & attached.policy.appends(pages)).sum())
        if needed > free:
            raise ValueError(ragged.pool.shortage(needed))

    def _allocate(self, key: Tensor, rows: int, length: int) -> RaggedCache:
        shape = self.attachment.head_shape(key.dtype)
        assert key.shape[1] == shape.kv_heads and key.shape[3] == shape.dim
        each = page_bytes(self._policies, shape, page_size=self._page_size)
        size = self._kv_memory
        if size is None:
            per_head = -(-self._max_tokens // self._page_size) + 1  # for which a decode step need not be counted
            most = int(SHARE_OF_FREE_MEMORY * free_memory(key.device))
            size = min(rows * len(self._policies) * shape.kv_heads * per_head * each, most)
        if size < each:
            raise ValueError(f"kv_memory of {human_bytes(size)} holds no page of {human_bytes(each)}; raise it")
        return allocate(
            self._policies,
            shape,
            pages=size // each,
            page_size=self._page_size,
            rows=rows,
            max_tokens=length,
            device=key.device,
        )

    # What Transformers calls

    def reset(self) -> None:
        """Forget everything and free all pages; the pool stays."""
        if self._torn is not None or self._forward is not None:
            self._executor = None  # its accounts may not add up: the next forward makes it anew
        self._torn = "a reset"
        self.columns = 0
        self._earlier_reads, self._peak = torch.zeros(()), torch.zeros_like(self._peak)
        if self._executor is not None:
            self._executor.ragged.clear()
            self._executor.forget_reads()
        self._prompts, self._forward, self._torn = set(), None, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork each row into `repeats` neighbours that share its settled pages; exact."""
        self.batch_select_indices(torch.arange(self.ragged.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes a copy of row indices[i]; rows not named are freed."""
        self._undo()
        self._torn = "a fork"
        try:
            before = self._running.select(indices.to(self.ragged.lengths.device))
        except ValueError:  # nothing was changed
            self._torn = None
            raise
        assert before is not None
        reads = self._earlier_reads.to(before.device) + before
        prompts = {new for new, old in enumerate(indices.tolist()) if old in self._prompts}
        self._earlier_reads, self._prompts, self._torn = reads, prompts, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: each beam continues from the row it came from."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what was overwritten cannot come back."""
        if tokens_to_remove:
            raise ValueError("a sparse cache cannot be cropped, evicted tokens are gone: fork it beforehand instead")

    def stats(self) -> KVStats:
        """What the cache holds now, read off the allocator."""
        self._undo()
        ragged = self.ragged
        per_head = ragged.lengths[0].numel() // ragged.rows * len(ragged.rings)
        held, seen = int(ragged.lengths.sum()), int(ragged.seen[0].sum())
        reads, bounds = (self._earlier_reads.cpu() + self._running.total_reads().cpu()).long()
        return KVStats(
            tokens_seen=seen,
            tokens_held=held / per_head,
            compression_ratio=seen * per_head / held if held else 1.0,
            kv_reads=int(reads.sum()) / per_head,
            bound_reads=int(bounds.sum()) / per_head,
            peak_tokens=int(self._peak) / per_head,
            pages=ragged.pool.pages_in_use,
            bytes=ragged.pool.pages_in_use * ragged.pool.page_bytes,
            index_bytes=ragged.index_bytes(),
            held=ragged.lengths.sum(1).tolist(),
            reads=reads.tolist(),
        )
