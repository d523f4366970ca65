"""A query reads the pages that their bounds rank highest, as a view that decode reads: reference and kernels alike."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bounding import BACKENDS, DEVICE, LENGTHS, PADDED_ROWS, bounds_of, longest, paged, unset
from sparsekv.ops.bounds import refresh, refresh_written, select
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import LayerPages


def queries(layer: LayerPages, group: int, batch: int, *, whole: bool = False) -> Tensor:
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    q = torch.randn(batch, heads * group, dim, generator=torch.Generator().manual_seed(1))
    return (q.mul(1.5).round() if whole else q).to(DEVICE, layer.kv.dtype)


def last_slots(layer: LayerPages, rows: Tensor) -> Tensor:
    """Where an appended token went."""
    return torch.where(rows[:, None] >= 0, layer.lengths[rows] - 1, -1)


def naive_scores(layer: LayerPages, row: int, head: int, q: Tensor, bounds: Tensor) -> list[float]:
    """The bound of each page of a head in float64, q [G, D], by the paper's formula."""
    scores = []
    for column in range(-(-int(layer.lengths[row, head]) // layer.page_size)):
        low, high = bounds[int(layer.pages[row, head, column])].double()
        scores.append(max(float(torch.maximum(x * low, x * high).sum()) for x in q.double()))
    return scores


def naive_columns(scores: list[float], count: int, written: int) -> list[int]:
    """The columns that are read; written: the column that always is, -1 for none."""
    ranked = sorted(range(len(scores)), key=lambda column: (column != written, -scores[column], column))
    return sorted(ranked[:count])


def grouped(layer: LayerPages, q: Tensor) -> Tensor:
    return q.unflatten(1, (layer.lengths.shape[1], -1))


def columns_of(layer: LayerPages, view: LayerPages, b: int, row: int, head: int) -> list[int]:
    """The page-table columns of a head that a view reads."""
    table = layer.pages[row, head].tolist()
    used = -(-int(view.lengths[b, head]) // layer.page_size)
    return [table.index(page) for page in view.pages[b, head, :used].tolist()]


def check_view(
    layer: LayerPages, rows: Tensor, q: Tensor, view: LayerPages, *, count: int, written: Tensor, rounding: float = 0.0
) -> None:
    """Which pages a view reads, how many tokens, and what else it says. rounding: by how much a score may be off."""
    bounds, size, heads = bounds_of(layer), layer.page_size, layer.lengths.shape[1]
    assert view.pages.shape == (len(rows), heads, count)
    assert (view.pages.dtype, view.lengths.dtype, view.seen.dtype) == (torch.int32,) * 3
    assert view.ring.shape == (len(rows), heads, 0)
    assert view.kv is layer.kv
    assert view.free is layer.free
    assert view.free_count is layer.free_count
    for b, row in enumerate(rows.tolist()):
        assert view.seen[b] == (layer.seen[row] if row >= 0 else 0)
        for head in range(heads):
            if row < 0:
                assert view.lengths[b, head] == 0
                continue
            length = int(layer.lengths[row, head])
            scores = naive_scores(layer, row, head, grouped(layer, q)[b, head], bounds)
            sure = int(written[b, head]) // size
            got, want = columns_of(layer, view, b, row, head), naive_columns(scores, count, sure)
            assert view.lengths[b, head] == sum(min(length - column * size, size) for column in got)
            if rounding == 0:
                assert got == want
            else:
                assert len(got) == len(want)
                assert got == sorted(set(got))
                assert sure in got or sure < 0
                least = min((scores[column] for column in want if column != sure), default=0)
                assert all(scores[column] >= least - rounding for column in got if column != sure)


@BACKENDS
@pytest.mark.parametrize(("dim", "group", "page_size"), [(16, 1, 8), (64, 3, 16), (80, 4, 4)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_pages_that_are_read(backend, dim, group, page_size, count):
    """Whole numbers, so that scores are exact and often equal: the very pages of the definition."""
    layer = paged(LENGTHS, dim=dim, page_size=page_size, whole=True)
    rows = torch.tensor(PADDED_ROWS, device=DEVICE)
    q, written = queries(layer, group, 5, whole=True), last_slots(layer, rows)
    options = {"count": count, "written": written, "longest": longest(layer)}
    view = select(layer, rows, q, bounds_of(layer), **options, backend=backend)
    check_view(layer, rows, q, view, count=count, written=written)


@BACKENDS
@settings(max_examples=8)
@given(
    lengths=st.lists(st.lists(st.integers(0, 60), min_size=2, max_size=2), min_size=1, max_size=3),
    count=st.integers(1, 9),
    group=st.integers(1, 4),
    spare=st.integers(0, 40),
    data=st.data(),
)
def test_any_lengths_and_any_written_slot(backend, lengths, count, group, spare, data):
    """longest may be more than the truth."""
    layer = paged(lengths, page_size=4, whole=True)
    rows = torch.arange(len(lengths), device=DEVICE)
    written = [[data.draw(st.integers(-1, n - 1)) for n in row] for row in lengths]
    written = torch.tensor(written, dtype=torch.int32, device=DEVICE)
    q = queries(layer, group, len(lengths), whole=True)
    options = {"count": count, "written": written, "longest": longest(layer) + spare}
    view = select(layer, rows, q, bounds_of(layer), **options, backend=backend)
    check_view(layer, rows, q, view, count=count, written=written)


@BACKENDS
@pytest.mark.parametrize("window", [0, 3])
def test_the_written_slot_is_found_by_the_ring_rule(backend, window):
    layer, rows = paged(LENGTHS, whole=True), torch.tensor([2, 0, 3, 1], device=DEVICE)
    ring = torch.full((4, 2, window), 9 << 1 | 1, dtype=torch.int32, device=DEVICE)
    ring[:, :, :1] = 3 << 1
    layer = dataclasses.replace(layer, ring=ring, seen=torch.tensor([7, 8, 9, 10], dtype=torch.int32, device=DEVICE))
    written = last_slots(layer, rows) if window == 0 else torch.tensor([[9, 9], [3, 3], [3, 3], [9, 9]], device=DEVICE)
    q, options = queries(layer, 2, 4, whole=True), {"count": 2, "longest": 64, "backend": backend}
    got, want = (select(layer, rows, q, bounds_of(layer), written=slots, **options) for slots in (None, written))
    live = torch.arange(2, device=DEVICE) * 8 < want.lengths[..., None]
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.pages[live], want.pages[live])


@BACKENDS
def test_reads_are_counted_by_row(backend):
    """Added to what is there, in a part of a larger account; rows that are not of the call, and padded ones, stay."""
    layer, rows = paged(LENGTHS, whole=True), torch.tensor([2, -1, 3, 0], device=DEVICE)
    account = torch.full((2, 3, 5, 2), 100, device=DEVICE)
    q, options = queries(layer, 2, 4, whole=True), {"count": 3, "longest": 64, "backend": backend}
    view = select(layer, rows, q, bounds_of(layer), written=None, reads=account[:, 1], **options)
    want = account.new_full(account.shape, 100)
    for b, row in enumerate(rows.tolist()):
        if row >= 0:
            want[0, 1, row] += view.lengths[b]
            want[1, 1, row] += -(-layer.lengths[row] // 8)
    assert torch.equal(account, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_errs_only_within_rounding(dtype):
    """Random scores in float32, of keys and queries of any type: pages change places only where they all but tie."""
    layer = paged([[700, 90], [33, 1000]], dim=64, dtype=dtype)
    rows = torch.arange(2, device=DEVICE)
    q, written = queries(layer, 4, 2), last_slots(layer, rows)
    bounds = bounds_of(layer)
    view = select(layer, rows, q, bounds, count=20, written=written, longest=1000, backend="triton")
    size = q.float().abs().sum(-1).max() * bounds[:-1].float().nan_to_num().abs().max()
    rounding = 2 * 64 * torch.finfo(torch.float32).eps * float(size)
    check_view(layer, rows, q, view, count=20, written=written, rounding=rounding)


@BACKENDS
def test_equal_bounds_prefer_the_first_pages(backend):
    """All keys equal, zero or negative zero: the first columns and the last written one."""
    layer = paged([[80, 80], [80, 80]])
    layer.kv[layer.pages[0].long(), 0] = 0.5
    layer.kv[layer.pages[1].long(), 0] = 0.0
    layer.kv[layer.pages[1, :, ::2].long(), 0] = -0.0
    rows = torch.arange(2, device=DEVICE)
    options = {"count": 4, "written": last_slots(layer, rows), "longest": 80}
    view = select(layer, rows, queries(layer, 2, 2, whole=True), bounds_of(layer), **options, backend=backend)
    assert torch.equal(view.pages, layer.pages[:, :, [0, 1, 2, 9]])


@BACKENDS
@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_scores_of_any_sign_and_size(backend, spread):
    """One channel, one key a page: the score is the key itself, and the threshold lies among negative ones."""
    layer = paged([[200]], dim=1, page_size=1)
    key = torch.randn(200, generator=torch.Generator().manual_seed(2)).to(DEVICE) * spread
    layer.kv[layer.pages[0, 0, :200].long(), 0, 0, 0] = key
    options = {"count": 150, "written": torch.tensor([[17]], dtype=torch.int32, device=DEVICE), "longest": 200}
    row, q = torch.tensor([0], device=DEVICE), key.new_ones(1, 1, 1)
    view = select(layer, row, q, bounds_of(layer), **options, backend=backend)
    assert columns_of(layer, view, 0, 0, 0) == naive_columns(key.tolist(), 150, 17)


@BACKENDS
@pytest.mark.parametrize("count", [8, 9, 40])
def test_enough_pages_read_all(backend, count):
    """Decoding over the view is decoding over the layer, padded places included."""
    layer = paged(LENGTHS)
    rows = torch.tensor(PADDED_ROWS, device=DEVICE)
    q, written = queries(layer, 3, 5), last_slots(layer, rows)
    view = select(layer, rows, q, bounds_of(layer), count=count, written=written, longest=64, backend=backend)
    assert torch.equal(view.lengths, torch.where(rows[:, None] >= 0, layer.lengths[rows], 0))
    every = torch.arange(5, device=DEVICE)
    got, want = (decode(*x, q, scale=0.3, return_lse=True, backend=backend) for x in ((view, every), (layer, rows)))
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@BACKENDS
def test_decode_over_a_view_is_attention_to_its_pages(backend):
    layer = paged(LENGTHS)
    rows = torch.tensor(PADDED_ROWS, device=DEVICE)
    q, written = queries(layer, 3, 5), last_slots(layer, rows)
    view = select(layer, rows, q, bounds_of(layer), count=3, written=written, longest=64, backend=backend)
    out = decode(view, torch.arange(5, device=DEVICE), q, scale=0.3, backend=backend).out.unflatten(1, (2, -1))
    for b, row in enumerate(PADDED_ROWS):
        for head in range(2):
            if row < 0 or LENGTHS[row][head] == 0:
                assert (out[b, head] == 0).all()
                continue
            slots = [
                slot
                for column in columns_of(layer, view, b, row, head)
                for slot in range(column * 8, min(column * 8 + 8, LENGTHS[row][head]))
            ]
            k, v = layer.kv[layer.pages[row, head].long()].transpose(0, 1).flatten(1, 2)[:, slots].double()
            want = (grouped(layer, q)[b, head].double() @ k.T * 0.3).softmax(-1) @ v
            assert torch.allclose(out[b, head].double(), want, atol=1e-5)


def test_no_key_scores_more_than_the_bound_of_its_page():
    """For every live key, query head and page, in float64."""
    layer = paged(LENGTHS, dtype=torch.float64)
    bounds, q = bounds_of(layer), grouped(layer, queries(layer, 3, 4))
    for row in range(4):
        for head, length in enumerate(LENGTHS[row]):
            for column, score in enumerate(naive_scores(layer, row, head, q[row, head], bounds)):
                page = layer.pages[row, head, column].item()
                live = min(length - column * 8, 8)
                assert (q[row, head] @ layer.kv[page, 0, :live].T).max() <= score + 1e-12


@BACKENDS
def test_the_view_lends_the_tickets_where_they_suffice(backend):
    """None, or too few for a padded batch: decode clears its own."""
    layer = paged([[20, 30]])
    rows = torch.tensor([0, -1], device=DEVICE)
    q, options = queries(layer, 1, 2), {"count": 2, "longest": 30, "backend": backend}
    for lent in (layer, dataclasses.replace(layer, tickets=None)):
        view = select(lent, rows, q, bounds_of(layer), written=last_slots(layer, rows), **options)
        assert view.tickets is None
        decode(view, torch.arange(2, device=DEVICE), q, scale=1.0, backend=backend)
    view = select(layer, rows[:1], q[:1], bounds_of(layer), written=last_slots(layer, rows[:1]), **options)
    assert view.tickets.data_ptr() == layer.tickets.data_ptr()


@BACKENDS
def test_a_batch_of_none_and_a_cache_of_nothing(backend):
    layer = paged([[0, 0]])
    for batch in (0, 1):
        rows, bounds = torch.zeros(batch, dtype=torch.int64, device=DEVICE), unset(layer)
        written = torch.full((batch, 2), -1, dtype=torch.int32, device=DEVICE)
        refresh(layer, rows, bounds, longest=0, backend=backend)
        refresh_written(layer, rows, written, bounds, backend=backend)
        assert bounds.isnan().all()
        q = queries(layer, 2, batch)
        view = select(layer, rows, q, bounds, count=2, written=written, longest=0, backend=backend)
        assert view.pages.shape == (batch, 2, 2)
        assert not view.lengths.any()


def test_refusals_name_the_reason():
    layer, rows = paged([[5, 5]]), torch.tensor([0], device=DEVICE)
    q, bounds, slots = queries(layer, 1, 1), unset(layer), torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    options = {"count": 1, "written": slots, "longest": 5}
    with pytest.raises(ValueError, match=r"this cache needs torch\.float32"):
        refresh(layer, rows, bounds.half(), longest=5)
    with pytest.raises(ValueError, match="this cache needs"):
        refresh_written(layer, rows, slots, bounds[:-1])
    with pytest.raises(ValueError, match=r"expected \[1, a multiple of 2 heads, 16\]"):
        select(layer, rows, q[..., :8], bounds, **options)
    with pytest.raises(ValueError, match="at least 1 page"):
        select(layer, rows, q, bounds, **{**options, "count": 0})
    with pytest.raises(ValueError, match=r"float64.*use 'reference'"):
        select(layer, rows, q.double(), bounds, **options, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        select(layer, rows, q, bounds, **options, backend="cuda")
    odd = dataclasses.replace(layer, kv=layer.kv[:, :, :5].contiguous())
    with pytest.raises(ValueError, match="power of two, not 5"):
        refresh(odd, rows, bounds, longest=5, backend="triton")


@contextmanager
def waiting_is_an_error():
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_one_cuda_graph_serves_all_lengths_without_waiting():
    layer = paged([[400, 900], [7, 2000], [1500, 0]], dim=128, page_size=16, dtype=torch.bfloat16, whole=True)
    rows, q = torch.tensor([0, 1, 2, -1], device=DEVICE), queries(layer, 4, 4, whole=True)
    bounds, written = bounds_of(layer), last_slots(layer, rows).clone()

    def step() -> tuple[LayerPages, Tensor]:
        refresh_written(layer, rows, written, bounds)
        view = select(layer, rows, q, bounds, count=20, written=written, longest=2000)
        return view, decode(view, torch.arange(4, device=DEVICE), q, scale=0.1).out

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), waiting_is_an_error():
        view, out = step()
    full = layer.lengths.clone()
    for share in (1, 3, 50):
        layer.lengths.copy_(full // share)
        written.copy_(last_slots(layer, rows))
        bounds.copy_(bounds_of(layer))
        graph.replay()
        check_view(layer, rows, q, view, count=20, written=written)
        assert torch.equal(out, decode(view, torch.arange(4, device=DEVICE), q, scale=0.1).out)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [4000, 16000])
def test_thousands_of_pages(pages):
    """All scores of a head in one program, many of them equal."""
    layer = paged([[pages * 4, 100], [pages * 2, pages * 3]], page_size=4, whole=True)
    rows = torch.arange(2, device=DEVICE)
    q, written = queries(layer, 2, 2, whole=True), last_slots(layer, rows)
    options = {"count": 1000, "written": written, "longest": pages * 4}
    got, want = (select(layer, rows, q, bounds_of(layer), **options, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got.lengths, want.lengths)
    live = torch.arange(1000, device=DEVICE) * 4 < want.lengths[..., None]
    assert torch.equal(got.pages[live], want.pages[live])
