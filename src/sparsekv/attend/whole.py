"""A layer of a forward without a cache: the whole sequence at once, the policy's marks as a mask (the hard rule) or, in
training, as a soft gate."""

from collections.abc import Callable

from torch import Tensor

from sparsekv import dms
from sparsekv.ops.gate import gate
from sparsekv.policies.base import Policy, Step
from sparsekv.policies.dmc import DMCPolicy
from sparsekv.policies.dms import DMSPolicy

Gates = Callable[[int, Tensor], Tensor]
"""(layer, logits float32 [T, H]) -> what attention adds to a score past the window, log(1 - alpha)."""


def whole_layer(
    policy: Policy,
    step: Step,
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    gates: Gates | None,
    documents: Tensor | None,
    own_heads: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """q: [B, H * G, S, D]; k, v: [B, H, S, D], of the heads of this process; step: all tokens, packed; gates: in
    training; documents: as in ops.gate; own_heads: (per head [B, all heads, S], H) -> [B, H, S]. Returns
    [B, S, H * G, D].

    Raises ValueError for a policy whose rule is not a mask.
    """
    if not policy.masks:
        raise ValueError(
            f"policy {policy.name!r} decides by what a cache holds, and this forward has none: pass "
            "past_key_values=sparsekv.SparseCache(model), or detach(model) for a dense forward"
        )
    query, key, value = qkv
    rows, heads, length = key.shape[:3]
    log_keep = None
    if gates is not None and isinstance(policy, DMSPolicy):
        log_keep = gates(step.layer, policy.logits(step.layer, step.hidden))
    else:
        marks = policy.marks(step)
        if marks is not None:
            log_keep = dms.hard_log_keep(marks, key.dtype)
    if log_keep is not None and isinstance(policy, DMCPolicy):
        means = policy.means(step, log_keep, rows=rows, soft=gates is not None, documents=documents)
        key, value = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in means)
    if log_keep is not None:
        by_sequence = log_keep.view(rows, length, -1).transpose(1, 2)
        log_keep = own_heads(dms.align(by_sequence, policy.lag, fill=0), heads)
    window = policy.window(step.layer)
    out = gate(query, key, value, log_keep, window=window, scale=step.scale, documents=documents)
    return out.transpose(1, 2)
