"""A worker's rows over memory that someone else made: reports tell what is held, released rows are empty, a shortage
stops the engine."""

import numpy as np
import pytest
import torch

from helpers import check_pages
from sparsekv.attend import Part
from sparsekv.dms import EvictionHead
from sparsekv.integrations.vllm.rows import Rows
from sparsekv.ops.layout import batch_of
from sparsekv.policies.dms import DMSPolicy

LAYERS, HEADS, DIM, SIZE = 2, 2, 8, 4


def make_rows(pages: int = 200) -> Rows:
    heads = [EvictionHead(6, HEADS).requires_grad_(False) for _ in range(LAYERS)]
    for head in heads:
        torch.nn.init.normal_(head.weight)
        head.bias.fill_(0.5)
    rows = Rows(
        [DMSPolicy(heads, window=3)] * LAYERS,
        kv_heads=HEADS,
        head_dim=DIM,
        page_size=SIZE,
        rows=3,
        max_tokens=100,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert not rows.ready
    rows.take(torch.zeros(pages * 2 * SIZE * DIM * 4 + 20, dtype=torch.int8)[: pages * 2 * SIZE * DIM * 4])
    assert rows.ready and rows.cache.pool.pages == pages
    return rows


def step(rows: Rows, counts: dict[int, int], *, decode: bool = False) -> None:
    """So many tokens of each row, in all layers."""
    torch.manual_seed(sum(counts.values()))
    batch = batch_of(torch.tensor(list(counts)), list(counts.values()))
    total = sum(counts.values())
    for layer in range(LAYERS):
        seen = rows.cache.seen[layer][batch.rows]
        part = Part(batch=batch, seen=seen, tokens=total, most=100)
        kv = torch.randn(total, HEADS, DIM)
        out = rows.attend(layer, part, [torch.randn(total, 6), torch.randn(total, 2 * HEADS, DIM), kv, kv], 0.3)
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
    for row, seen in enumerate((21, 0, 8)):
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
    assert rows.cache.seen[0].tolist() == [0, 9, 0] and not rows.cache.lengths[:, 0].any()
    check_pages(rows.cache)


def test_a_shortage_stops_the_engine():
    rows = make_rows(pages=4)
    with pytest.raises(RuntimeError, match=r"are needed and 4 are free; the KV pages ran short.*this engine stops"):
        step(rows, {0: 30})
    rows.cache.pool.free_count.fill_(-2)  # as kernels leave it, which cannot raise
    rows.snapshot(7)
    with pytest.raises(RuntimeError, match="2 pages are missing after step 7; the KV pages ran short"):
        rows.report()
