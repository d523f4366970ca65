"""A worker's rows over memory that someone else made: reports tell what is held, released rows are empty, a shortage
stops the engine, and a step recorded for a number of tokens does what the step does by its parts."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import check_pages
from sparsekv.attend import Part
from sparsekv.dms import EvictionHead
from sparsekv.integrations.vllm.worker.fill import Step
from sparsekv.integrations.vllm.worker.rows import Rows
from sparsekv.ops.layout import batch_of
from sparsekv.policies.dms import DMSPolicy

LAYERS, HEADS, DIM, SIZE, ROWS = 2, 2, 8, 4, 4


def make_rows(pages: int = 200) -> Rows:
    heads = [EvictionHead(6, HEADS).requires_grad_(False) for _ in range(LAYERS)]
    for head in heads:
        torch.nn.init.normal_(head.weight)
        head.bias.fill_(0.5)
    made = Rows(
        [DMSPolicy(heads, window=3)] * LAYERS,
        kv_heads=HEADS,
        head_dim=DIM,
        page_size=SIZE,
        rows=ROWS,
        max_tokens=100,
        step_tokens=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert not made.ready
    made.take(torch.zeros(pages * 2 * SIZE * DIM * 4 + 20, dtype=torch.int8)[: pages * 2 * SIZE * DIM * 4])
    assert made.ready and made.cache.pool.pages == pages
    return made


def step(rows: Rows, counts: dict[int, int]) -> None:
    """So many tokens of each row, in all layers."""
    torch.manual_seed(sum(counts.values()))
    batch = batch_of(torch.tensor(list(counts)), list(counts.values()))
    total = sum(counts.values())
    for layer in range(LAYERS):
        seen = rows.cache.seen[layer][batch.rows]
        part = Part(batch=batch, seen=seen, tokens=total, most=100)
        kv = torch.randn(total, HEADS, DIM)
        out = rows.attend(layer, [part], [torch.randn(total, 6), torch.randn(total, 2 * HEADS, DIM), kv, kv], 0.3)
        assert out.shape == (total, 2 * HEADS, DIM)


def test_reports_tell_what_is_held():
    rows = make_rows()
    step(rows, {0: 20, 2: 7})
    step(rows, {0: 1, 2: 1})
    rows.snapshot(5)
    report = rows.report()
    assert report is not None and report.step == 5
    assert rows.report() is None
    lengths = rows.cache.lengths.numpy()
    for row, seen in enumerate((21, 0, 8, 0)):
        held = lengths[:, row].flatten()
        assert report.table[row].tolist() == [
            seen,
            int((-(-held // SIZE)).sum()),
            *np.bincount(held % SIZE, minlength=SIZE),
        ]


def test_only_the_newest_report_counts():
    rows = make_rows()
    for number in (1, 2, 3):
        step(rows, {1: 1})
        rows.snapshot(number)
    report = rows.report()
    assert report is not None and report.step == 3 and report.table[1, 0] == 3


def test_released_rows_are_empty():
    rows = make_rows()
    step(rows, {0: 20, 1: 9})
    rows.release([])
    rows.release([0])
    assert rows.cache.seen[0].tolist() == [0, 9, 0, 0] and not rows.cache.lengths[:, 0].any()
    check_pages(rows.cache)


def test_a_shortage_stops_the_engine():
    rows = make_rows(pages=4)
    with pytest.raises(RuntimeError, match=r"are needed and 4 are free; the KV pages ran short.*this engine stops"):
        step(rows, {0: 30})
    rows.cache.pool.free_count.fill_(-2)  # as kernels leave it, which cannot raise
    rows.snapshot(7)
    with pytest.raises(RuntimeError, match="2 pages are missing after step 7; the KV pages ran short"):
        rows.report()


def fill(rows: Rows, which: list[int], counts: list[int]) -> tuple[Tensor, int]:
    """Tell the buffers of a step; returns starts and how many decodes come first."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    decodes = next((i for i, count in enumerate(counts) if count > 1), len(counts))
    row = torch.tensor(which, dtype=torch.int32)
    slots, after = torch.zeros(sum(counts), dtype=torch.int64), rows.cache.seen[0][row] + starts.diff()
    rows.buffers.fill(Step(blocks=row[:, None] + 1, slots=slots, starts=starts, after=after, decodes=decodes))
    return starts, decodes


def tokens_of(total: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[Any] = [(total, 6), (total, 2 * HEADS, DIM), (total, HEADS, DIM), (total, HEADS, DIM)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(
            st.permutations(range(ROWS)), st.lists(st.integers(1, 9), min_size=1, max_size=ROWS), st.integers(0, 5)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_recorded_steps(steps):
    """Decodes before chunks, a chunk of one token among them, requests in any order, padding behind."""
    torch.manual_seed(0)
    plain = make_rows()
    torch.manual_seed(0)
    recorded = make_rows()
    for number, (order, counts, padding) in enumerate(steps):
        counts = [count for count in counts if count == 1] + [count for count in counts if count > 1]
        which, total = order[: len(counts)], sum(counts)
        starts, decodes = fill(plain, which, counts)
        fill(recorded, which, counts)
        parts = [plain.buffers.decodes(decodes)] if decodes else []
        if decodes < len(counts):
            chunked = {"longest": max(counts), "tokens": total - decodes}
            parts.append(plain.buffers.chunks(starts[decodes:], decodes, **chunked))
        for layer in range(LAYERS):
            tokens = tokens_of(total + padding, 10 * number + layer)
            want = plain.attend(layer, parts, tokens, 0.3)
            got = recorded.attend_recorded(layer, tokens, 0.3)
            assert torch.allclose(got[:total], want[:total], atol=1e-5)
            assert want.shape == got.shape and got.isfinite().all()
            assert (want[total:] == 0).all()
        for name in ("lengths", "seen"):
            assert torch.equal(getattr(recorded.cache, name), getattr(plain.cache, name))
        check_pages(recorded.cache)


def test_a_graph_without_a_step_does_nothing():
    """vLLM runs them on ranks that have no request, and before it records them."""
    rows = make_rows()
    rows.attend_recorded(0, tokens_of(7, 0), 0.3)
    assert not rows.cache.seen.any()
    fill(rows, [2, 0], [1, 6])
    for layer in range(LAYERS):
        rows.attend_recorded(layer, tokens_of(7, 0), 0.3)
    rows.snapshot(1)
    lengths = rows.cache.lengths.clone()
    rows.attend_recorded(0, tokens_of(7, 0), 0.3)
    assert torch.equal(rows.cache.lengths, lengths) and rows.cache.seen[0].tolist() == [6, 0, 1, 0]
