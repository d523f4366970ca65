"""inspect: which head forgot which token of a text, by any policy, as the cache really holds it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.cache.stats import KVStats
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.attached import Attachment
from sparsekv.modeling.cache import SparseCache
from sparsekv.modeling.tracing.held import StoredKeys
from sparsekv.policies.dms import DMSPolicy

POINTS = 12
"""Lengths at which the ratio is measured on the way."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a policy made of one text, in every layer that it governs."""

    layers: list[int]
    """The governed layers."""
    held: Tensor
    """bool [layers, kv_heads, tokens]: what the cache holds after the last token. Of tokens that were merged into one
    slot, the newest counts."""
    read: Tensor | None
    """bool, the same shape: what of it the last token's query read, where the policy reads less than all."""
    window: int
    """Newest tokens that are held whatever was decided; 0 where the policy knows none."""
    lengths: list[int]
    """Tokens read when each of `ratios` was measured."""
    ratios: list[float]
    stats: KVStats
    logits: Tensor | None = None
    """DMS and DMC: float32 [layers, kv_heads, tokens], z with the dial's offset, aligned to the tokens they decide."""
    marks: Tensor | None = None
    """DMS and DMC: bool, the same shape: True = forgotten once it leaves the window."""


@torch.no_grad()
def inspect(model: PreTrainedModel, input_ids: Tensor, *, prompt: int | None = None) -> Trace:
    """Run one text, int64 [1, tokens] or [tokens], through an attached model and see what it holds.

    prompt: for a policy that prunes a finished prompt or chooses what a query reads, the tokens read as the prompt; the
    rest comes one by one. None = the first half; for the others the text is one prompt.

    Raises ValueError if the model is not attached, the text is not a single sequence, or `prompt` leaves no token.
    """
    attachment = attachment_of(model)
    ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"inspect takes one text, and input_ids is {tuple(input_ids.shape)}")
    tokens = ids.shape[1]
    steps = attachment.policy.prunes or attachment.policy.selects
    if prompt is None:
        prompt = tokens // 2 if steps else tokens
    if not 0 <= prompt <= tokens - steps:
        raise ValueError(f"prompt is {prompt} and the text has {tokens} tokens; leave one at least to come after it")
    cache, stored, logits = SparseCache(model), StoredKeys(), _Logits(attachment)
    lengths, ratios = [], []
    known = prompt if steps else 0
    stops = sorted({known + max(1, round((tokens - known) * (i + 1) / POINTS)) for i in range(POINTS)})
    with stored.watching([layer.policy for layer in attachment.layers]), logits:
        for start, end in _pieces(tokens, known, stops=stops, one_by_one=steps):
            model(ids[:, start:end], past_key_values=cache, logits_to_keep=1)
            if end in stops or start == 0:
                lengths.append(end)
                ratios.append(cache.stats().compression_ratio)
    layers = [attached.layer for attached in attachment.layers if attached.policy is attachment.policy]
    held = {layer: stored.tokens_in(layer, cache.ragged.layer(layer)) for layer in layers}
    z = logits.aligned()
    return Trace(
        layers=layers,
        held=torch.stack(list(held.values())),
        read=torch.stack([_read(stored, layer, held[layer]) for layer in layers])
        if attachment.policy.selects
        else None,
        window=attachment.policy.window(layers[0]),
        lengths=lengths,
        ratios=ratios,
        stats=cache.stats(),
        logits=z,
        marks=None if z is None else z > 0,
    )


def _pieces(tokens: int, prompt: int, *, stops: list[int], one_by_one: bool) -> list[tuple[int, int]]:
    """[first, last + 1) of the tokens of each forward."""
    ends = [prompt] * (prompt > 0) + (list(range(prompt + 1, tokens + 1)) if one_by_one else stops)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _read(stored: StoredKeys, layer: int, held: Tensor) -> Tensor:
    view = stored.read[layer]
    return held if view is None else stored.tokens_in(layer, view)


class _Logits:
    """The logits that DMS decides by, of the forwards within; of other policies none."""

    def __init__(self, attachment: Attachment) -> None:
        self.policy = attachment.policy
        self.parts: dict[int, list[Tensor]] = {}

    def __enter__(self) -> None:
        policy = self.policy
        if not isinstance(policy, DMSPolicy):
            return
        logits = policy.logits

        def record(layer: int, hidden: Tensor) -> Tensor:
            z = logits(layer, hidden)
            self.parts.setdefault(layer, []).append(z.cpu())
            return z

        policy.logits, policy.decode_marks = record, policy.marks  # a decode step would leave them to the kernel

    def __exit__(self, *_: object) -> None:
        if isinstance(self.policy, DMSPolicy):
            del self.policy.logits, self.policy.decode_marks

    def aligned(self) -> Tensor | None:
        """float32 [layers, kv_heads, tokens], aligned to the tokens they decide."""
        if not self.parts:
            return None
        z = torch.stack([torch.cat(self.parts[layer]).T for layer in sorted(self.parts)])
        return dms.align(z, self.policy.lag, fill=-torch.inf)
