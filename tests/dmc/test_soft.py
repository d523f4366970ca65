"""The soft rule: its recurrence, its window, its gradients, and hard decisions as its limit."""

import torch
from torch import Tensor

from sparsekv import dmc, dms
from sparsekv.ops.gate.api import gate

B, S, H, D = 2, 9, 2, 4


def draw(length: int = S, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(B, length, H, D, dtype=torch.float64, generator=g) for _ in range(2))
    w, alpha = (torch.rand(B, length, H, dtype=torch.float64, generator=g) for _ in range(2))
    return key, value, w + 0.01, alpha


def naive(x: Tensor, w: Tensor, alpha: Tensor, window: int) -> Tensor:
    """The recurrence over the last `window` tokens, started anew for each token; one text per row."""
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        n, z = torch.zeros_like(x[:, 0]), torch.zeros_like(w[:, 0])
        for s in range(max(0, t - window + 1), t + 1):
            n = alpha[:, s, :, None] * n + w[:, s, :, None] * x[:, s]
            z = alpha[:, s] * z + w[:, s]
        out[:, t] = n / z[..., None]
    return out


def test_the_recurrence_in_its_window():
    key, value, w, alpha = draw(20)
    for window in (1, 2, 12, 20, 99):
        got = dmc.soft_accumulate(key, value, w, alpha, window=window)
        for mine, x in zip(got, (key, value), strict=True):
            torch.testing.assert_close(mine, naive(x, w, alpha, window))
    assert torch.equal(
        dmc.soft_accumulate(key, value, w, alpha)[0], dmc.soft_accumulate(key, value, w, alpha, window=12)[0]
    )


def test_hard_decisions_are_the_hard_rule_up_to_the_window():
    """Half of the tokens merge, and at most eleven in a row."""
    key, value, w, alpha = draw(60)
    merge = alpha < 0.5
    merge[:, ::12] = False
    got = dmc.soft_accumulate(key, value, w, merge.double())
    nothing = dmc.Carry(torch.zeros_like(w[:, 0]), torch.zeros_like(key[:, 0]), torch.zeros_like(value[:, 0]))
    starts = torch.arange(B + 1, dtype=torch.int32) * 60
    packed = (x.flatten(0, 1) for x in (key, value, w, merge))
    wanted = dmc.accumulate(*packed, nothing, starts=starts, longest=60)
    for mine, other in zip(got, wanted[:2], strict=True):
        torch.testing.assert_close(mine.flatten(0, 1), other)


def test_packed_texts_are_the_texts_alone():
    key, value, w, alpha = draw()
    packed = dmc.soft_accumulate(key, value, w, alpha, documents=torch.tensor([[0] * 4 + [1] * 5] * B))
    for part in (slice(0, 4), slice(4, S)):
        alone = dmc.soft_accumulate(*(x[:, part] for x in (key, value, w, alpha)))
        for mine, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(mine[:, part], other)


def test_gradients():
    tensors = [x[:, :5].requires_grad_() for x in draw()]
    assert torch.autograd.gradcheck(lambda *x: dmc.soft_accumulate(*x, window=3), tensors)


def test_inputs_are_left_alone_and_types_kept():
    key, value, w, alpha = (x.bfloat16() for x in draw())
    before = [x.clone() for x in (key, value, w, alpha)]
    out = dmc.soft_accumulate(key, value, w, alpha)
    assert all(torch.equal(a, b) for a, b in zip(before, (key, value, w, alpha), strict=True))
    assert [x.dtype for x in out] == [torch.bfloat16] * 2


def test_the_gate_leaves_the_slots_that_a_cache_would_hold():
    """With hard decisions, gated attention over all partial means is attention over the slots as each query finds
    them: finished ones, and the one its own token is in."""
    key, value, w, alpha = draw()
    merge = alpha < 0.5
    keys, values = (x.transpose(1, 2) for x in dmc.soft_accumulate(key, value, w, merge.double()))
    query = torch.randn(B, H, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    log_keep = dmc.key_gate(dms.hard_log_keep(merge, torch.float64))
    got = gate(query, keys, values, log_keep, window=1, scale=1.0, backend="reference")
    for b in range(B):
        for h in range(H):
            slots: list[int] = []  # the newest token of each
            for t in range(S):
                if t and merge[b, t, h]:
                    slots.pop()
                slots.append(t)
                weights = (keys[b, h, slots] @ query[b, h, t]).softmax(0)
                torch.testing.assert_close(got[b, h, t], weights @ values[b, h, slots])


def test_the_gate_is_the_log_probability_that_the_next_token_opens():
    logit = torch.randn(B, S, H, dtype=torch.float64)
    moved = dmc.key_gate(dms.log_keep(logit))
    torch.testing.assert_close(moved[..., :-1].exp(), (1 - logit.sigmoid())[:, 1:].transpose(1, 2))
    assert not moved[..., -1].any()
