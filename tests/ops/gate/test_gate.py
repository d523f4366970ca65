"""gate's reference against the equation written out, and its gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.ops.gate import gate


def naive(q, k, v, log_keep, window, documents):
    """The equation, one score at a time."""
    rows, heads, length, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            for i in range(length):
                keys = [j for j in range(i + 1) if documents is None or documents[b, i] == documents[b, j]]
                scores = [
                    0.3 * (q[b, h, i] @ k[b, h // group, j])
                    + (log_keep[b, h // group, j] if log_keep is not None and i - j >= window else 0)
                    for j in keys
                ]
                out[b, h, i] = torch.stack(scores).softmax(0) @ v[b, h // group, keys]
    return out


def inputs(length, *, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, h, length, 3, generator=generator).double() for h in (4, 2, 2))
    return q, k, v, -torch.rand(rows, 2, length, generator=generator).double() * 3


@settings(max_examples=30)
@given(
    length=st.integers(1, 9),
    window=st.integers(1, 10),
    kind=st.sampled_from(["none", "soft", "hard"]),
    packed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_reference_is_the_equation(length, window, kind, packed, seed):
    q, k, v, log_keep = inputs(length, seed=seed)
    if kind == "hard":
        log_keep = torch.where(log_keep < -1.5, -torch.inf, 0)
    keep = None if kind == "none" else log_keep
    documents = torch.arange(length).expand(2, -1) // 4 if packed else None
    out = gate(q, k, v, keep, window=window, scale=0.3, documents=documents)
    assert torch.allclose(out, naive(q, k, v, keep, window, documents), atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_finite_differences(packed):
    tensors = [x.requires_grad_() for x in inputs(6, rows=1)]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]]) if packed else None
    assert torch.autograd.gradcheck(lambda *x: gate(*x, window=2, scale=0.3, documents=documents), tensors)


@pytest.mark.gpu
def test_a_gradient_for_the_gate_alone_on_cuda():
    """As the heads of a first layer want it, where nothing else is trained."""

    def gradient(device):
        q, k, v, log_keep = (x.float().to(device) for x in inputs(6))
        log_keep.requires_grad_()
        gate(q, k, v, log_keep, window=2, scale=0.3, backend="reference").square().sum().backward()
        return log_keep.grad.cpu()

    torch.testing.assert_close(gradient("cuda"), gradient("cpu"), rtol=1e-3, atol=1e-4)


def test_a_gate_inside_the_window_gets_no_gradient():
    q, k, v, log_keep = inputs(5)
    log_keep.requires_grad_()
    gate(q, k, v, log_keep, window=3, scale=0.3).sum().backward()
    assert torch.equal(log_keep.grad[..., 2:], torch.zeros(2, 2, 3).double())
    assert (log_keep.grad[..., :2] != 0).all()


def test_hard_marks_give_finite_gradients():
    q, k, v, log_keep = inputs(6)
    log_keep = torch.full_like(log_keep, -torch.inf)
    for x in (q, k, v):
        x.requires_grad_()
    out = gate(q, k, v, log_keep, window=1, scale=0.3)
    out.sum().backward()
    assert torch.allclose(out, v.repeat_interleave(2, 1))  # each query sees itself alone
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_padding_as_a_document_of_its_own_gives_no_nan():
    q, k, v, log_keep = inputs(4)
    documents = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    out = gate(q, k, v, log_keep, window=1, scale=0.3, documents=documents)
    assert torch.isfinite(out).all()
    alone = gate(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], log_keep[1:, :, 2:], window=1, scale=0.3)
    assert torch.allclose(out[1:, :, 2:], alone)


def test_backends_are_named():
    q, k, v, log_keep = inputs(3)
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; use one of reference"):
        gate(q, k, v, log_keep, window=1, scale=0.3, backend="cudnn")
    with pytest.raises(ValueError, match="flex backend needs CUDA"):
        gate(q, k, v, log_keep, window=1, scale=0.3, backend="flex")
