"""The matrix products of a compiled decode step through ops.linear, which reads weights at the memory's speed.

To the compiler each product is one opaque operation, sparsekv::linear, so that the kernel is chosen by the number of
tokens at hand when a CUDA graph is recorded and not when the graph is compiled.
"""

from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from sparsekv.engine.device.merge import is_product
from sparsekv.ops.linear import linear


def with_own_products(graph: fx.GraphModule, workspace: Tensor) -> fx.GraphModule:
    """Replace every linear(x, weight) without a bias. workspace: ops.linear's, to be kept as long as the graph runs."""
    _WORKSPACES[id(workspace)] = workspace
    for node in list(graph.graph.nodes):
        if is_product(node):
            with graph.graph.inserting_before(node):
                args = (*node.args[:2], id(workspace))
                node.replace_all_uses_with(graph.graph.call_function(torch.ops.sparsekv.linear.default, args))
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


_WORKSPACES: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


@torch.library.custom_op("sparsekv::linear", mutates_args=())
def product(x: Tensor, weight: Tensor, workspace: int) -> Tensor:
    """x: [..., K]; weight: [N, K]. It writes to the workspace, which nothing else reads: the compiler need not know."""
    out = linear(x.reshape(-1, x.shape[-1]), weight, workspace=_WORKSPACES[workspace])
    return out.view(*x.shape[:-1], len(weight))


@product.register_fake
def _(x: Tensor, weight: Tensor, workspace: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
