"""inspect: which head forgot which token of a text."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.cache.stats import KVStats
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.cache import SparseCache
from sparsekv.policies.dms import DMSPolicy


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The decisions of every governed layer over one text."""

    logits: Tensor
    """float32 [layers, kv_heads, tokens]: z, the dial's offset included, aligned to the tokens they decide."""
    marks: Tensor
    """bool [layers, kv_heads, tokens]: True = forgotten once it leaves the window."""
    window: int
    stats: KVStats

    @property
    def held(self) -> Tensor:
        """bool [layers, kv_heads, tokens]: what the cache holds after the last token."""
        tokens = self.marks.shape[-1]
        position = torch.arange(tokens)
        return dms.visible(torch.tensor(tokens - 1), position, self.marks, self.window)


@torch.no_grad()
def inspect(model: PreTrainedModel, input_ids: Tensor) -> Trace:
    """Run one text, int64 [1, tokens] or [tokens], through an attached model and record every decision.

    Raises ValueError if the model is not attached with DMS or the text is not a single sequence.
    """
    policy = attachment_of(model).policy
    if not isinstance(policy, DMSPolicy):
        raise ValueError(f"policy {policy.name!r} makes no decisions per token; attach with DMS to inspect a model")
    ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"inspect takes one text, and input_ids is {tuple(input_ids.shape)}")
    recorded: list[Tensor] = []
    cache = SparseCache(model)
    logits = policy.logits

    def record(layer: int, hidden: Tensor) -> Tensor:
        recorded.append(logits(layer, hidden))
        return recorded[-1]

    policy.logits, policy.decode_marks = record, policy.marks  # a decode step would leave its logits to the kernel
    try:
        model(ids, past_key_values=cache, logits_to_keep=1)
    finally:
        del policy.logits, policy.decode_marks
    z = torch.stack([x.T.cpu() for x in recorded])
    marks = dms.align(dms.marks(z), policy.lag, fill=False)
    return Trace(
        logits=dms.align(z, policy.lag, fill=-torch.inf),
        marks=marks,
        window=policy.window(0),
        stats=cache.stats(),
    )
