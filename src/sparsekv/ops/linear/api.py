"""linear: the matrix product of a decode step, few tokens by large weights, which takes as long as reading the weights.

out = x W^T, accumulated in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekv.ops.layout import check_backend
from sparsekv.ops.linear import reference

if TYPE_CHECKING:
    from sparsekv.ops.linear.triton import LinearConfig

BACKENDS = ("reference", "triton")


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    workspace: Tensor | None = None,
    backend: str | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """x: [T, K]; weight: [N, K]. Returns [T, N].

    workspace: from `workspace_for`; the Triton kernel makes its own where there is none, which costs a launch. Calls
    that share one must follow each other in one stream. config: how the kernel is cut, for benchmarks.

    Without a backend's name, Triton runs on CUDA for at most 32 tokens of 16-bit numbers, PyTorch's own elsewhere.
    Raises ValueError where the shapes do not fit, or the backend asked for is unknown or cannot run.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [T, K] and [N, K]")
    if check_backend(backend, x.device, BACKENDS) == "triton":
        from sparsekv.ops.linear import triton

        obstacle = triton.obstacle(x, weight)
        if obstacle is None:
            return triton.linear(x, weight, workspace_for(x.device) if workspace is None else workspace, config)
        if backend == "triton":
            raise ValueError(f"backend 'triton' {obstacle}; use 'reference'")
    return reference.linear(x, weight)


def workspace_for(device: torch.device) -> Tensor:
    """What the Triton kernel keeps between programs: tickets, zero between calls, and pieces of sums."""
    from sparsekv.ops.linear import triton

    return triton.workspace(device)
