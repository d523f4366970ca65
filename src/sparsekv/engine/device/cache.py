"""EngineCache: the transformers.Cache face of the engine's rows, for one packed forward [1, T] of an unmodified model.

The first tokens are decodes, one per row; the rest are chunks of prompts. Each part goes through the policy's own
decode_layer or prefill_layer, as it does under SparseCache. To torch.compile one layer is one opaque operation,
sparsekv::attend, so that a graph records the kernels and nothing of the cache.
"""

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparsekv.cache.ragged import RaggedCache
from sparsekv.modeling.attached import AttachedLayer, Attachment, PagedCache
from sparsekv.ops.layout import Batch
from sparsekv.policies import Policy, Step, decode_layer, prefill_layer


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows' tokens in a packed forward."""

    batch: Batch
    seen: Tensor
    """int32 [B]: tokens of each sequence before the forward."""
    tokens: int
    """T of this part."""


class EngineCache(PagedCache):
    """ragged: the rows. `parts` = (decodes, chunks) says what the forward under way holds.

    Positions are given and no mask is wanted, so no columns are counted.
    """

    def __init__(self, attachment: Attachment, ragged: RaggedCache) -> None:
        super().__init__(len(attachment.layers))
        self.ragged = ragged
        self.attached = attachment.layers
        self.parts: tuple[Part | None, Part | None] = (None, None)
        self.handle = id(self)
        self.reads: Tensor | None = None
        """int64 [R]: tokens read by each row's decodes, where a policy reads less than it holds; else None."""
        if any(type(attached.policy).read is not Policy.read for attached in self.attached):
            self.reads = torch.zeros(ragged.rows, dtype=torch.int64, device=ragged.lengths.device)
        self._prunes: list[tuple[int, Tensor, Tensor]] = []
        _CACHES[self.handle] = self

    def attend(
        self,
        attached: AttachedLayer,
        hidden: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """One layer of a forward. hidden: [1, T, hidden_size]; q: [1, H * G, T, D]; k, v: [1, H, T, D]; mask: None.
        Returns [1, T, H * G, D]."""
        if torch.compiler.is_compiling():
            return torch.ops.sparsekv.attend(*qkv, hidden, attached.layer, self.handle, scale)
        return self.attend_packed(attached.layer, hidden, qkv, scale)

    def attend_packed(self, layer: int, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
        """As attend, by layer number."""
        tokens = [hidden[0], *(x[0].transpose(0, 1) for x in qkv)]
        outs, first = [], 0
        for part, run in zip(self.parts, (self._decode, self._prefill), strict=True):
            if part is not None:
                mine = [x[first : first + part.tokens] for x in tokens]
                outs.append(run(layer, part, mine, scale))
                first += part.tokens
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]

    def end_forward(self) -> None:
        """Carry out what policies pruned."""
        for layer, rows, keep in self._prunes:
            self.ragged.prune(layer, rows, keep)
        self._prunes.clear()

    def reset(self) -> None:
        """Forget a forward that did not end."""
        self.parts = (None, None)
        self._prunes.clear()
        if self.reads is not None:
            self.reads.zero_()

    def _decode(self, layer: int, part: Part, tokens: list[Tensor], scale: float) -> Tensor:
        policy, step, pages = (
            self.attached[layer].policy,
            self._step(layer, part, tokens, scale),
            self.ragged.layer(layer),
        )
        out, read = decode_layer(policy, step, pages)
        if self.reads is not None:
            rows = part.batch.rows
            self.reads.index_add_(0, rows, read.lengths[rows].sum(-1))
        return out

    def _prefill(self, layer: int, part: Part, tokens: list[Tensor], scale: float) -> Tensor:
        policy, step, pages = (
            self.attached[layer].policy,
            self._step(layer, part, tokens, scale),
            self.ragged.layer(layer),
        )
        out = prefill_layer(policy, step, pages)
        keep = policy.prune(step, pages)
        if keep is not None:
            self._prunes.append((layer, part.batch.rows, keep))
        return out

    def _step(self, layer: int, part: Part, tokens: list[Tensor], scale: float) -> Step:
        hidden, query, key, value = tokens
        return Step(
            layer=layer,
            batch=part.batch,
            hidden=hidden,
            query=query,
            key=key,
            value=value,
            seen=part.seen,
            scale=scale,
            state=self.ragged.state[layer],
        )


_CACHES: WeakValueDictionary[int, EngineCache] = WeakValueDictionary()


@torch.library.custom_op("sparsekv::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layer: int, handle: int, scale: float) -> Tensor:
    """EngineCache.attend as one operation. It writes to the cache, which the compiler does not see; each layer's input
    depends on the output of the one before, which keeps them in order."""
    # Contiguous, as the fake below promises the compiler; the kernels' outputs are so already.
    return _CACHES[handle].attend_packed(layer, hidden, (q, k, v), scale).contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layer: int, handle: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
