"""The model's products become ours; its logits stay."""

from typing import Any

import pytest
import torch

from helpers import tiny_model, tokens
from sparsekv.engine.device.merge import lay_end_to_end, merge
from sparsekv.engine.device.products import with_own_products


@pytest.mark.parametrize(("family", "left"), [("Llama", 0), ("Qwen3", 0), ("Gemma3", 0), ("Qwen2", 3)])
@torch.no_grad()
def test_every_product_without_a_bias(family: str, left: int) -> None:
    torch._dynamo.reset()
    model, ids = tiny_model(family), tokens(2, 9)
    lay_end_to_end(model)
    expected = model(ids, use_cache=False).logits
    counts: dict[str, int] = {}

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        own = with_own_products(merge(graph, inputs))
        targets = [node.target for node in own.graph.nodes]
        counts["own"] = targets.count(torch.ops.sparsekv.linear.default)
        counts["left"] = targets.count(torch.nn.functional.linear)
        return own.forward

    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(ids), expected, atol=1e-5)
    layers = model.config.get_text_config().num_hidden_layers
    assert counts == {"own": 4 * layers + 1 - (layers if left else 0), "left": left * layers}


def test_the_opaque_product_declares_its_output() -> None:
    arguments = (torch.randn(1, 3, 8), torch.randn(5, 8))
    torch.library.opcheck(torch.ops.sparsekv.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
