"""The soft rule, for training: every token merges to the extent alpha, and queries see unfinished slots.

alpha[t] = sigmoid(l[t]), l = (logit + logistic noise) / 0.1 as in DMS (`dms.logistic`): how far token t merges.
n[t] = alpha[t] n[t-1] + w[t] k[t],  z[t] = alpha[t] z[t-1] + w[t],  key'[t] = n[t] / z[t], values likewise.

Every key'[j] stays a key of its own: what the slot held once token j was in it. Query i = j sees it as it is; a later
query sees it only as far as token j + 1 opened another slot, so its score gets log(1 - alpha[j + 1]). That is DMS's
gate with window 1, each decision moved to the token before (`key_gate`, then ops.gate with window = 1).

The window of 12: key'[t] is the mean of tokens t - 11 .. t alone, so the recurrence unrolled 12 terms deep; a token
that lies further back has left the mean even where every alpha since is 1.
"""

import torch
from torch import Tensor

from sparsekv import dms


def soft_accumulate(
    key: Tensor, value: Tensor, importance: Tensor, alpha: Tensor, *, window: int = 12, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted means that stand in for keys and values, differentiable in all four.

    key, value: [B, S, H, D] before RoPE; importance: [B, S, H], positive; alpha: [B, S, H] in [0, 1]; documents: int
    [B, S] as in ops.gate, or None where each row is one text. The first token of a text merges into nothing, whatever
    its alpha. With alpha 0 or 1 and segments of at most `window` tokens this is `accumulate`.

    Returns keys and values in the types they came in. Works in float32, float64 for float64.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    length, weight = key.shape[1], importance.to(dtype)
    alpha = alpha.to(dtype)[:, 1:]
    if documents is not None:
        alpha = alpha * (documents[:, 1:] == documents[:, :-1])[..., None]
    token = weight[..., None] * torch.cat([key, value], dim=-1).to(dtype)
    z, total = weight.clone(), token.clone()
    reach = torch.ones_like(weight)  # the product of the alphas between token t - back and token t, for t = back ..
    for back in range(1, min(window, length)):
        reach = reach[:, 1:] * alpha[:, : length - back]
        z[:, back:] += reach * weight[:, :-back]
        total[:, back:] += reach[..., None] * token[:, :-back]
    keys, values = (total / z[..., None]).split([key.shape[-1], value.shape[-1]], dim=-1)
    return keys.to(key.dtype), values.to(value.dtype)


def key_gate(log_open: Tensor) -> Tensor:
    """What ops.gate adds to the score of each key beyond window 1: log(1 - alpha[j + 1]) for key j, 0 for the last.

    log_open: [B, S, H], log(1 - alpha): `dms.log_keep(l)` in training, `dms.hard_log_keep(merge)` for hard decisions.
    Returns [B, H, S]. Packed texts need no more: the queries of one never see the keys of another.
    """
    return dms.align(log_open.transpose(1, 2), 1, fill=0.0)
