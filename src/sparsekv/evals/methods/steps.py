"""A text as generation reads it: the first `start` tokens are the prompt, read at once; every further one is a decode
step, so that methods that prune a finished prompt, or choose what a query reads, act on all that is scored.

For methods whose rule acts within a prefill as well, a forward of the whole text is the same, and faster (by steps:
False); what decode steps read is not counted then.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.cache.stats import KVStats
from sparsekv.evals.forward import CHUNK
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.cache import SparseCache
from sparsekv.modeling.split import SplitModel
from sparsekv.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a batch of texts left."""

    hidden: Tensor
    """[B, S - 1 - start, hidden_size]: of the tokens from `start` on, each of which predicts the next; the text's last
    is not read."""
    tokens: Tensor
    """int64 [B, S - 1 - start]: the tokens that followed: given, or the most likely ones."""
    stats: KVStats


def needs_steps(policy: Policy) -> bool:
    """Whether it does something that a forward of the whole text would not."""
    return policy.prunes or policy.selects


@torch.no_grad()
def walk(
    split: SplitModel,
    ids: Tensor,
    *,
    start: int,
    pads: Tensor | None = None,
    by_steps: bool = True,
    greedy: bool = False,
) -> Walk:
    """ids: int64 [B, S], S > start + 1. pads: int64 [B], each at most start: tokens of padding that rows begin with.
    greedy: follow the most likely token instead of the text's."""
    assert 0 <= start < ids.shape[1] - 1 and (by_steps or not greedy)
    cache = SparseCache(split.model, max_tokens=ids.shape[1])

    def prefill(part: Tensor) -> list[Tensor]:
        return [split.hidden(chunk, cache=cache, pads=pads) for chunk in part.split(CHUNK, dim=1)]

    if not by_steps:
        assert not needs_steps(attachment_of(split.model).policy)
        hidden = torch.cat(prefill(ids[:, :-1]), dim=1)
        return Walk(hidden=hidden[:, start:], tokens=ids[:, start + 1 :], stats=cache.stats())
    if start:
        prefill(ids[:, :start])
    parts: list[Tensor] = []
    following: list[Tensor] = []
    token = ids[:, start : start + 1]
    for at in range(start + 1, ids.shape[1]):
        parts.append(split.hidden(token, cache=cache, pads=pads))
        token = split.logits(parts[-1]).argmax(-1) if greedy else ids[:, at : at + 1]
        following.append(token)
    return Walk(hidden=torch.cat(parts, dim=1), tokens=torch.cat(following, dim=1), stats=cache.stats())
