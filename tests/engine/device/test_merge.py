"""Projections of one input become one product; the model stays what it was."""

from typing import Any

import pytest
import torch

from helpers import tiny_model, tokens
from sparsekv.engine.device.merge import lay_end_to_end, merge

LINEAR = torch.nn.functional.linear
PER_LAYER = {"Llama": (7, 4), "Qwen3": (7, 4), "Gemma3": (7, 4), "Phi3": (4, 4), "Qwen2": (7, 6)}
"""Products before and after; Phi-3 comes merged, and biases (q, k and v of Qwen2) keep theirs apart."""


@pytest.mark.parametrize("family", PER_LAYER)
@torch.no_grad()
def test_fewer_products_and_the_same_logits(family: str) -> None:
    torch._dynamo.reset()
    model, ids = tiny_model(family), tokens(2, 9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(ids, use_cache=False).logits
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(sum(node.target is LINEAR for node in graph.graph.nodes))
        merged = merge(graph, inputs)
        counts.append(sum(node.target is LINEAR for node in merged.graph.nodes))
        return merged.forward

    lay_end_to_end(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(ids), expected, atol=1e-5)
    layers = model.config.get_text_config().num_hidden_layers
    before, after = PER_LAYER[family]
    assert counts == [layers * before + 1, layers * after + 1]
    after_state = model.state_dict()
    assert list(after_state) == list(state)
    assert all(torch.equal(after_state[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_weights_that_lie_apart_are_left_alone() -> None:
    torch._dynamo.reset()
    model, ids = tiny_model(), tokens(1, 5)
    lay_end_to_end(model)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        merged = merge(graph, inputs)
        counts.append(sum(node.target is LINEAR for node in merged.graph.nodes))
        return merged.forward

    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(ids), model(ids, use_cache=False).logits, atol=1e-5)
    assert counts == [2 * 4 + 2 + 1]
