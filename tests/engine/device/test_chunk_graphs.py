"""What recorded chunks rest on and a CPU can check: padding changes nothing, and steps that do not fit run as they are.
On a GPU the tests of the engine compare recorded chunks with eager ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsekv
from helpers import random_heads, tiny_model
from serving import attached, engine
from sparsekv.attend import Part
from sparsekv.engine.build import _chunk_graphs
from sparsekv.engine.device.chunk_graphs import SEQUENCES, SIZES, ChunkGraphs, PaddedChunks
from sparsekv.ops.layout import Batch, batch_of
from sparsekv.policies import Policy
from sparsekv.policies.registry import METHODS

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dms": {"window": 4},
    "streaming": {"budget": 12},
    "tova": {"budget": 12},
    "random": {"budget": 12},
    "snapkv": {"budget": 40},
}
CHUNKS = [(0, 7, 0), (2, 5, 0), (0, 3, 7), (2, 9, 5)]
"""Row, tokens, tokens before: two steps of two rows."""


def _forward(model: Any, cache: Any, part: Part, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cache.parts = (None, part)
    return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]


def _contents(ragged: Any) -> list[torch.Tensor]:
    state = [x for name in ("row", "slot", "page") for x in getattr(ragged.state(0), name).values()]
    return [ragged.lengths, ragged.seen, ragged.pool.free_count, *ragged.rings, *(x[:-1] for x in state)]


def test_every_policy_that_pads_is_tested() -> None:
    assert set(OPTIONS) == {name for name, kind in METHODS.items() if kind.pads_chunks}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """Logits, what is held and what is remembered."""
    results = []
    for padded in (False, True):
        model = tiny_model(dtype=torch.float64)
        sparsekv.attach(model, policy=name, **OPTIONS[name])
        model = random_heads(model) if name == "dms" else model
        cache = engine(model).engine.runner.cache
        buffers, logits = PaddedChunks(torch.device("cpu"), max_tokens=99), []
        for step in (CHUNKS[:2], CHUNKS[2:]):
            rows, counts, before = (list(x) for x in zip(*step, strict=True))
            batch = batch_of(torch.tensor(rows), counts)
            part = Part(batch=batch, seen=torch.tensor(before).int(), tokens=sum(counts), most=99)
            ids = torch.arange(3, 3 + sum(counts))
            positions = torch.cat([torch.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
            keep = torch.tensor([counts[0] - 1, sum(counts) - 1])
            if padded:
                buffers.fill(part, ids, positions, keep, size=32)
                part, all_ids, all_positions, kept = buffers.forward_of(32)
                logits.append(_forward(model, cache, part, all_ids, all_positions)[kept][:2])
            else:
                logits.append(_forward(model, cache, part, ids[None], positions[None])[keep])
        results.append((torch.stack(logits), [x.clone() for x in _contents(cache.ragged)]))
    (plain, held), (ours, ours_held) = results
    assert torch.allclose(ours, plain, atol=1e-12)
    assert all(torch.allclose(a.double(), b.double(), atol=1e-12) for a, b in zip(held, ours_held, strict=True))


def test_an_empty_step_writes_nothing() -> None:
    model = attached("dms")
    cache = engine(model).engine.runner.cache
    buffers = PaddedChunks(torch.device("cpu"), max_tokens=99)
    before = [x.clone() for x in _contents(cache.ragged)]
    buffers.empty(64)
    part, ids, positions, _ = buffers.forward_of(64)
    with torch.no_grad():
        _forward(model, cache, part, ids, positions)
    assert all(torch.equal(a, b) for a, b in zip(before, _contents(cache.ragged), strict=True))


def test_a_short_step_after_a_long_one_asks_for_its_own_tokens_alone() -> None:
    buffers = PaddedChunks(torch.device("cpu"), max_tokens=99)
    for tokens, chunks, size in ((60, 3, 64), (20, 2, 32)):
        batch = batch_of(torch.arange(chunks), [tokens // chunks] * chunks)
        part = Part(batch=batch, seen=torch.zeros(chunks).int(), tokens=tokens, most=99)
        ids = torch.arange(tokens)
        buffers.fill(part, ids, ids, batch.starts[1:].long() - 1, size=size)
        part, _, _, keep = buffers.forward_of(size)
        assert int(keep.max()) == tokens - 1
        assert part.batch.rows[chunks:].eq(-1).all()
        assert part.batch.starts[chunks + 1 :].eq(size).all()


@pytest.mark.parametrize(("tokens", "chunks", "kept"), [(SIZES[-1] + 1, 1, 1), (64, SEQUENCES, 0), (64, 1, SEQUENCES)])
def test_what_has_no_graph_is_left_to_the_caller(tokens: int, chunks: int, kept: int) -> None:
    cache = engine(attached("dms")).engine.runner.cache
    forward: Any = pytest.fail
    graphs = ChunkGraphs(forward, cache, pool=(0, 0), max_tokens=99)
    rows, starts = torch.arange(chunks), torch.zeros(chunks + 1, dtype=torch.int32)
    part = Part(batch=Batch(rows=rows, starts=starts, longest=2), seen=rows.int(), tokens=tokens, most=99)
    assert graphs.run(part, rows, rows, torch.zeros(kept, dtype=torch.int64)) is None


def test_only_policies_that_leave_padding_alone_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that is not the decodes'."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))

    class Touches(Policy):
        pads_chunks = False

    cache = engine(attached("dense")).engine.runner.cache
    graphs: Any = SimpleNamespace(forward=None, cache=cache)
    made = _chunk_graphs(graphs, max_tokens=9)
    assert made is not None
    assert made._pool == (0, 7)
    cache.executor.policies = [Policy(), Touches()]
    assert _chunk_graphs(graphs, max_tokens=9) is None
    assert _chunk_graphs(None, max_tokens=9) is None
