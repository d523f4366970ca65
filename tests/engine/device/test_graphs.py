"""What CUDA graphs rest on and a CPU can check: layers of the unmodified model compile, with attention opaque."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch

from serving import attached, engine
from sparsekv.attend import Part
from sparsekv.engine.device import regions
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


def _plain(model: Any, cache: EngineCache) -> Any:
    def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]

    return forward


class _Kept:
    """A backend that runs what it is given as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    @property
    def layers(self) -> list[torch.fx.GraphModule]:
        return [g for g in self.graphs if any("attend_under_way" in str(node.target) for node in g.graph.nodes)]


WINDOWS = ["sliding_attention", "full_attention"] * 2
KINDS = {"Llama": 1, "Qwen3": 1, "Gemma3": 2, "Phi3": 1}
"""Gemma 3 has two kinds of layers, with windows and without, which differ in nothing but their rotation."""


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_one_layer_is_compiled_for_all_layers_and_all_batches(family: str) -> None:
    options: dict[str, Any] = {"layer_types": WINDOWS} if family == "Gemma3" else {}
    model = attached("dms", family, num_hidden_layers=len(WINDOWS), **options)
    cache = engine(model).engine.runner.cache
    kept = _Kept()
    compiled = compiled_decode(model, cache, backend=kept)
    for count in (4, 3, 2, 1):
        ours, plain = _three_steps(cache, compiled, count), _three_steps(cache, _plain(model, cache), count)
        assert torch.allclose(ours, plain)
    assert 1 <= len(kept.layers) <= KINDS[family]
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_chunks_run_what_decodes_run() -> None:
    """Of any length, one token among them; and logits of the tokens kept alone."""
    model = attached("dms", "Qwen3")
    cache, kept = engine(model).engine.runner.cache, _Kept()
    compiled = compiled_decode(model, cache, backend=kept)
    for count in (9, 5, 1):
        results = []
        for forward in (compiled, _plain(model, cache)):
            cache.ragged.clear()
            starts = torch.tensor([0, count], dtype=torch.int32)
            batch = Batch(rows=torch.tensor([1]), starts=starts, longest=max(count, 2))
            cache.parts = (None, Part(batch=batch, seen=torch.zeros(1, dtype=torch.int32), tokens=count, most=99))
            results.append(forward(torch.arange(3, 3 + count)[None], torch.arange(count)[None]))
            assert int(cache.ragged.seen[0, 1]) == count
        assert torch.allclose(*results)
        cache.ragged.clear()
        last = compiled(torch.arange(3, 3 + count)[None], torch.arange(count)[None], torch.tensor([count - 1]))
        assert torch.allclose(last, results[0][-1:])
    assert len(kept.layers) == 1


@torch.no_grad()
def test_layers_that_differ_are_compiled_apart() -> None:
    """What a layer's code depends on is checked, never assumed."""
    model = attached("dms", num_hidden_layers=3)
    model.model.layers[2].input_layernorm.variance_epsilon = 0.5
    cache, kept = engine(model).engine.runner.cache, _Kept()
    compiled = compiled_decode(model, cache, backend=kept)
    assert torch.allclose(_three_steps(cache, compiled, 3), _three_steps(cache, _plain(model, cache), 3))
    assert len(kept.layers) == 2


@torch.no_grad()
def test_many_engines_of_a_process_each_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code object is compiled a bounded number of times; engines come and go beyond that."""
    monkeypatch.setattr(regions, "KINDS", 4)
    kept = []
    for i in range(6):
        model = attached("dms", num_hidden_layers=1, hidden_size=32 if i % 2 else 64)
        cache = engine(model).engine.runner.cache
        compiled = compiled_decode(model, cache, backend="eager")
        assert torch.allclose(_three_steps(cache, compiled, 2), _three_steps(cache, _plain(model, cache), 2))
        kept += map(weakref.ref, (model, cache, compiled, compiled.workspace, compiled._runs[0][2]))
        del model, cache, compiled
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []


@torch.no_grad()
def test_two_engines_over_one_model() -> None:
    model = attached("dms")
    (one, first), (two, second) = (
        (cache, compiled_decode(model, cache, backend="eager"))
        for cache in (engine(model).engine.runner.cache for _ in range(2))
    )
    places = [parameter.data_ptr() for parameter in model.parameters()]
    for count in (2, 3):
        for cache, compiled in ((one, first), (two, second)):
            assert torch.allclose(
                _three_steps(cache, compiled, count), _three_steps(cache, _plain(model, cache), count)
            )
    compiled_decode(model, two, backend="eager")
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


@torch.no_grad()
def test_nothing_of_an_engine_is_written_into_its_code() -> None:
    """So that what one process has compiled is found on disk by the next."""
    codes = []
    for _ in range(2):
        model = attached("dms", "Qwen3")
        cache, kept = engine(model).engine.runner.cache, _Kept()
        _three_steps(cache, compiled_decode(model, cache, backend=kept), 2)
        codes.append([graph.code for graph in kept.graphs])
    assert codes[0] == codes[1]


@torch.no_grad()
def test_opaque_attention_declares_its_output() -> None:
    """Shapes, strides and dtypes of the fake are those of the real one."""
    model = attached("dms")
    cache = engine(model).engine.runner.cache
    cache.parts = (
        Part(
            batch=Batch(rows=torch.arange(2), starts=torch.arange(3, dtype=torch.int32), longest=1),
            seen=torch.zeros(2, dtype=torch.int32),
            tokens=2,
            most=9,
        ),
        None,
    )
    forward = compiled_decode(model, cache, backend="eager")
    q, k = (torch.randn(1, heads, 3, 8, dtype=torch.float64) for heads in (4, 2))
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    arguments = (q, k, k.clone(), hidden, 0.3)
    with forward._running():
        forward.layer = 0
        torch.library.opcheck(
            torch.ops.sparsekv.attend_under_way.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        out = torch.ops.sparsekv.attend_under_way(*arguments)
    assert not out[:, 2].any()  # of a token that no part holds


def test_buckets() -> None:
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(6) == [2, 4, 6]
    assert buckets_up_to(64) == [2, 4, 8, 16, 32, 48, 64]
    assert buckets_up_to(300)[-3:] == [224, 256, 300]
    many = buckets_up_to(2048)
    assert many[-5:] == [1024, 1280, 1536, 1792, 2048] and len(many) < 30
    assert all(b - a <= max(a // 4, 32) for a, b in pairwise(many))


def test_what_cannot_be_recorded_says_why() -> None:
    class Asks(Policy):
        name = "asks"
        recordable = False

    assert why_not_recordable([Policy(), *METHODS.values()]) is None
    assert "'asks' asks the device" in str(why_not_recordable([Policy(), Asks()]))
