"""The matrix products of compiled layers through ops.linear, which reads weights at the memory's speed.

To the compiler each product is one opaque operation, sparsekv::linear, so that the kernel is chosen by the number of
tokens at hand when a CUDA graph is recorded and not when the layer is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, fx

from sparsekv.engine.device.merge import is_product
from sparsekv.ops.linear import linear

_WORKSPACE: ContextVar[Tensor | None] = ContextVar("workspace", default=None)


def with_own_products(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace every linear(x, weight) without a bias."""
    for node in list(graph.graph.nodes):
        if is_product(node):
            with graph.graph.inserting_before(node):
                own = graph.graph.call_function(torch.ops.sparsekv.linear.default, node.args[:2])
                node.replace_all_uses_with(own)
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


@contextmanager
def workspace_of(workspace: Tensor) -> Iterator[None]:
    """Products within use this workspace of ops.linear; it lives as long as a graph recorded here."""
    token = _WORKSPACE.set(workspace)
    try:
        yield
    finally:
        _WORKSPACE.reset(token)


@torch.library.custom_op("sparsekv::linear", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x: [..., K]; weight: [N, K]. It writes to the workspace, which nothing else reads: the compiler need not know.
    Nor is the workspace an argument: compiled code would then be one engine's."""
    out = linear(x.reshape(-1, x.shape[-1]), weight, workspace=_WORKSPACE.get())
    return out.view(*x.shape[:-1], len(weight))


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
