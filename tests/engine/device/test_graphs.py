"""What CUDA graphs rest on and a CPU can check: the unmodified model compiles whole, with attention opaque."""

from typing import Any

import pytest
import torch

from serving import attached, engine
from sparsekv.attend import Part
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.graphs import buckets_up_to, compiled_decode, why_not_recordable
from sparsekv.ops.layout import Batch
from sparsekv.policies import Policy
from sparsekv.policies.registry import METHODS


def _three_steps(cache: EngineCache, forward: Any, count: int) -> torch.Tensor:
    cache.ragged.clear()
    logits = torch.empty(0)
    for position in range(3):
        batch = Batch(rows=torch.arange(count), starts=torch.arange(count + 1, dtype=torch.int32), longest=1)
        cache.parts = (Part(batch=batch, seen=torch.full((count,), position).int(), tokens=count, most=99), None)
        logits = forward(torch.arange(3, 3 + count)[None], torch.full((1, count), position))
    return logits


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3", "Phi3"])
@torch.no_grad()
def test_one_compilation_for_all_batches_and_one_for_a_batch_of_one(family: str) -> None:
    torch._dynamo.reset()
    model = attached("dms", family)
    cache = engine(model).engine.runner.cache
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def plain(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]

    compiled = compiled_decode(model, cache, backend=backend)
    for count in (4, 3, 2, 1):
        assert torch.allclose(_three_steps(cache, compiled, count), _three_steps(cache, plain, count))
    assert len(graphs) == 2
    for graph in graphs:
        calls = [node for node in graph.graph.nodes if "sparsekv.attend" in str(node.target)]
        assert len(calls) == len(cache.executor.policies)


def test_the_opaque_operation_declares_its_output() -> None:
    """Shapes, strides and dtypes of the fake are those of the real one."""
    cache = engine(attached("dms")).engine.runner.cache
    batch = Batch(rows=torch.arange(2), starts=torch.arange(3, dtype=torch.int32), longest=1)
    cache.parts = (Part(batch=batch, seen=torch.zeros(2, dtype=torch.int32), tokens=2, most=9), None)
    q, k = (torch.randn(1, heads, 2, 8, dtype=torch.float64) for heads in (4, 2))
    hidden = torch.randn(1, 2, 32, dtype=torch.float64)
    arguments = (q, k, k.clone(), hidden, 0, cache.handle, 0.3)
    torch.library.opcheck(torch.ops.sparsekv.attend.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_buckets() -> None:
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(6) == [1, 2, 4, 6]
    assert buckets_up_to(64) == [1, 2, 4, *range(8, 65, 8)]
    assert buckets_up_to(300)[-3:] == [272, 288, 300]


def test_what_cannot_be_recorded_says_why() -> None:
    class Asks(Policy):
        name = "asks"
        recordable = False

    assert why_not_recordable([Policy(), *METHODS.values()]) is None
    assert "'asks' asks the device" in str(why_not_recordable([Policy(), Asks()]))
