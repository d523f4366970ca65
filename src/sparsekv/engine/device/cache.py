"""EngineCache: the transformers.Cache face of the engine's rows, for one packed forward [1, T] of an unmodified model.

The first tokens are decodes, one per row; the rest are chunks of prompts.
"""

import torch
from torch import Tensor

from sparsekv.attend import Executor, Part
from sparsekv.cache.ragged import RaggedCache
from sparsekv.modeling.attached import AttachedLayer, Attachment, PagedCache


class EngineCache(PagedCache):
    """ragged: the rows. `parts` = (decodes, chunks) says what the forward under way holds.

    Positions are given and no mask is wanted, so no columns are counted.
    """

    def __init__(self, attachment: Attachment, ragged: RaggedCache) -> None:
        super().__init__(len(attachment.layers))
        policies = [attached.policy for attached in attachment.layers]
        self.executor = Executor(ragged, policies, count_reads=any(policy.selects for policy in policies))
        self.parts: tuple[Part | None, Part | None] = (None, None)

    @property
    def ragged(self) -> RaggedCache:
        return self.executor.ragged

    @property
    def reads(self) -> Tensor | None:
        """int64 [2, N, R + 1, H]: see Executor.reads; None where all that is held is read."""
        return self.executor.reads

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
        return self.attend_packed(attached.layer, hidden, qkv, scale)

    def attend_packed(self, layer: int, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
        """As attend, by layer number."""
        tokens = [hidden[0], *(x[0].transpose(0, 1) for x in qkv)]
        outs, first = [], 0
        for part in self.parts:
            if part is not None:
                mine = [x[first : first + part.tokens] for x in tokens]
                outs.append(self.executor.run(layer, part, mine, scale))
                first += part.tokens
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]

    def reset(self) -> None:
        """Forget a forward that did not end."""
        self.parts = (None, None)
        self.executor.reset()
