"""Projections of one input as one matrix product: q, k and v together, gate and up together.

A decode step reads every weight once, so fewer and larger products come nearer to the memory's speed. The weights of
such a group are laid end to end in one buffer, of which the model's own parameters become views: no byte more, and the
model's code, eager forwards and state_dict are as before. The compiler's graph then gets one product over the buffer
and a split where it had several products.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that read the same input, as Transformers' decoders call them."""


@torch.no_grad()
def lay_end_to_end(model: nn.Module) -> None:
    """Make the weights of each group without biases adjacent views of one buffer. Weights that are so already stay
    where they are: graphs of another engine over this model may read them there."""
    for module in model.modules():
        for names in GROUPS:
            group = [getattr(module, name, None) for name in names]
            if not all(type(x) is nn.Linear and x.bias is None for x in group):
                continue
            weights = [x.weight for x in group if isinstance(x, nn.Linear)]
            if _adjacent(weights):
                continue
            whole = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
                weight.data = part


def merge(graph: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
    """Replace linear(x, w1), linear(x, w2), ... whose weights are adjacent in memory by one product and a split."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    value = dict(zip(placeholders, inputs, strict=True))
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if is_product(node) and isinstance(value.get(node.args[1]), Tensor):
            by_input.setdefault(node.args[0], []).append(node)
    for source, nodes in by_input.items():
        nodes.sort(key=lambda node: value[node.args[1]].data_ptr())
        if len(nodes) > 1 and _adjacent([value[node.args[1]] for node in nodes]):
            _replace(graph.graph, source, nodes, [value[node.args[1]] for node in nodes])
    graph.graph.lint()
    graph.recompile()
    return graph


def is_product(node: fx.Node) -> bool:
    """Whether it is linear(x, weight) without a bias."""
    if node.op != "call_function" or node.target is not linear or len(node.args) < 2:
        return False
    return all(bias is None for bias in (*node.args[2:], *node.kwargs.values()))


def _adjacent(weights: list[Tensor]) -> bool:
    """Whether contiguous weights of one width follow each other in one storage."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        same = weight.dtype == first.dtype and weight.shape[1] == first.shape[1] and weight.is_contiguous()
        if not same or weight.data_ptr() != end:
            return False
        end += weight.numel() * weight.element_size()
    return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def _replace(graph: fx.Graph, source: fx.Node, nodes: list[fx.Node], weights: list[Tensor]) -> None:
    """One product over all rows of the buffer, before the first of the nodes it replaces."""
    rows, width = [len(weight) for weight in weights], weights[0].shape[1]
    with graph.inserting_before(min(nodes)):
        buffer = graph.call_function(torch.as_strided, (nodes[0].args[1], (sum(rows), width), (width, 1)))
        product = graph.call_function(linear, (source, buffer))
        parts = graph.call_function(torch.split, (product, rows, -1))
        for i, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (parts, i))
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
