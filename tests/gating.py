"""Texts with gates, and the error that an attention over them may have: that of eager attention, by the reference in
float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.ops.gate import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = 4
"""How many times the error of eager attention in the same type a kernel may have, both against float64."""
ATTENTION = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A text's inputs and the gradient of its output. The gate is float32 whatever the type of the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor | None
    documents: Tensor | None
    grad: Tensor
    window: int

    def run(self, attend: ATTENTION, dtype: torch.dtype, **options) -> list[Tensor]:
        """The output and the gradients of q, k, v and, where there is one, the gate."""
        kinds = (dtype, dtype, dtype, torch.promote_types(dtype, torch.float32))
        leaves = [
            None if x is None else x.detach().to(kind).requires_grad_()
            for x, kind in zip((self.q, self.k, self.v, self.log_keep), kinds, strict=True)
        ]
        scale = 1.5 * self.q.shape[-1] ** -0.5
        out = attend(*leaves, self.window, scale, self.documents, **options)
        out.backward(self.grad.to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves if x is not None)]


def scene(
    length: int,
    *,
    rows: int = 1,
    heads: int = 1,
    group: int = 2,
    dim: int = 16,
    window: int = 5,
    kind: str = "soft",
    documents: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Scene:
    """Tensors as a projection leaves them: [B, S, H, D] seen as [B, H, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(rows, length, n, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for n in (heads * group, heads, heads, heads * group)
    )
    log_keep = -4 * torch.rand(rows, length, heads, generator=generator).to(DEVICE).transpose(1, 2)
    if kind == "hard":
        log_keep = torch.where(log_keep < -2, -torch.inf, 0)
    ids = None if documents is None else torch.tensor(documents, device=DEVICE)
    gate = None if kind == "none" else log_keep
    return Scene(q=q, k=k, v=v, log_keep=gate, documents=ids, grad=grad, window=window)


def assert_right(scene: Scene, attend: ATTENTION = triton.gate, **options) -> None:
    """At most BUDGET times as far from the exact result as eager attention is, or as one rounding of it or, in float32,
    of the products dO V^T, which cancel in the softmax's gradient."""
    got = scene.run(attend, scene.q.dtype, **options)
    eager, exact = scene.run(reference.gate, scene.q.dtype), scene.run(reference.gate, torch.float64)
    products = scene.grad.float() @ scene.v.float().repeat_interleave(scene.q.shape[1] // scene.v.shape[1], 1).mT
    for name, ours, rounded, true in zip(("out", "q", "k", "v", "gate"), got, eager, exact, strict=False):
        own = torch.finfo(scene.q.dtype).eps * true.abs().max()
        rounding = torch.maximum(own, torch.finfo(torch.float32).eps * products.abs().max())
        assert (ours - true).abs().max() <= BUDGET * torch.maximum((rounded - true).abs().max(), rounding), name
