"""weigh equals the column sums of dense attention, the reference to the last digits of float64, the kernel to the error
of eager float32, whatever the lengths and the cut."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paging import DEVICE, paged, within_budget
from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import Batch, LayerPages, batch_of
from sparsekv.ops.place import place
from sparsekv.ops.prefill import prefill
from sparsekv.ops.weigh import reference, triton, weigh

BACKENDS = ["reference", "triton"]
LENGTHS = [[0, 111], [3, 31], [32, 150], [63, 1]]
COUNTS = [3, 1, 70, 0]


def packed(layer: LayerPages, counts: list[int], group: int) -> tuple[Batch, Tensor]:
    """Queries of the rows, the last first, in the layer's type."""
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(counts), heads * group, dim, generator=generator)
    return batch_of(torch.arange(len(counts) - 1, -1, -1, device=DEVICE), counts), q.to(DEVICE, layer.kv.dtype)


def dense(
    layer: LayerPages, batch: Batch, q: Tensor, scale: float, longest: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Sums [B, H, longest] and log-sum-exp [T, H * G] by a masked softmax, every operation in dtype."""
    heads = layer.lengths.shape[1]
    q = q.unflatten(1, (heads, -1)).to(dtype)
    lse = q.new_full(q.shape[:3], -torch.inf)
    sums = q.new_zeros(len(batch.rows), heads, longest)
    for b, row in enumerate(batch.rows.tolist()):
        first, end = batch.starts[b : b + 2].tolist()
        for h in range(heads if row >= 0 else 0):
            length = int(layer.lengths[row, h])
            k = layer.kv[layer.pages[row, h].long(), 0].flatten(0, 1)[:length].to(dtype)
            scores = q[first:end, h] @ k.T * scale  # [n, G, L]
            later = torch.arange(end - first - 1, -1, -1, device=DEVICE)  # tokens after each query
            hidden = torch.arange(length, device=DEVICE) >= length - later[:, None]
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
            lse[first:end, h] = scores.logsumexp(-1)
            column = scores.softmax(-1).nan_to_num(0).sum((0, 1))[:longest]
            sums[b, h, : len(column)] = column
    return sums, lse.flatten(1, 2)


def check(layer: LayerPages, batch: Batch, q: Tensor, *, scale: float, longest: int, known: bool) -> None:
    """known: the log-sum-exp is given."""
    want, lse = dense(layer, batch, q, scale, longest)
    wide = dataclasses.replace(layer, kv=layer.kv.double())
    options = {"scale": scale, "longest": longest}
    exact = weigh(wide, batch, q.double(), **options, lse=lse if known else None, backend="reference")
    assert torch.allclose(exact, want, rtol=1e-9, atol=1e-12)
    for backend in BACKENDS:
        got = weigh(layer, batch, q, **options, lse=lse.float() if known else None, backend=backend)
        assert got.dtype == torch.float32
        assert (got[want == 0] == 0).all()
        if len(q):
            assert within_budget(got, dense(layer, batch, q, scale, longest, torch.float32)[0], want, lse)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element left unwritten shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("dim", "group", "page_size", "dtype"),
    [
        (64, 3, 32, torch.float16),
        (64, 4, 16, torch.bfloat16),
        (80, 1, 16, torch.float16),
        (16, 4, 32, torch.float32),
        (128, 3, 16, torch.bfloat16),
        (256, 1, 32, torch.float32),
    ],
)
def test_sums_are_those_of_dense_attention(dim, group, page_size, dtype, known, poisoned):
    """A chunk, then a decode step; an empty head and one with fewer slots than queries; more queries than a tile."""
    layer = paged(LENGTHS, dim=dim, page_size=page_size, dtype=dtype)
    for counts in (COUNTS, [1, 1, 1, 1]):
        check(layer, *packed(layer, counts, group), scale=dim**-0.5, longest=150, known=known)


@settings(max_examples=15)
@given(
    cases=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=3),
    group=st.integers(1, 3),
    longest=st.sampled_from([1, 16, 70, 75]),
    known=st.booleans(),
    small=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
)
def test_any_lengths_in_small_tiles(cases, group, longest, known, small):
    layer = paged([[*case[:2]] for case in cases], page_size=16)
    batch, q = packed(layer, [case[2] for case in reversed(cases)], group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "cut", lambda dim, dtype: small)
        patch.setattr(reference, "BLOCK", 16)
        check(layer, batch, q, scale=0.7, longest=longest, known=known)


@pytest.mark.parametrize("known", [True, False])
def test_large_scores_do_not_overflow(known):
    layer = paged(LENGTHS)
    batch, q = packed(layer, COUNTS, 2)
    assert dense(layer, batch, q, 100.0, 150)[1].max() > 1000
    check(layer, batch, q, scale=100.0, longest=150, known=known)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_chunks_add_up_to_one(backend):
    layer = paged([[90, 40]])
    batch, q = packed(layer, [37], 3)
    options = {"scale": 0.5, "longest": 90, "backend": backend}
    before = dataclasses.replace(layer, lengths=layer.lengths - 15)
    parts = [
        weigh(part, batch_of(batch.rows, [len(chunk)]), chunk, **options)
        for part, chunk in ((before, q[:22]), (layer, q[22:]))
    ]
    whole = weigh(layer, batch, q, **options)
    assert torch.allclose(parts[0] + parts[1], whole, atol=1e-5)
    assert torch.allclose(whole.sum(-1), torch.tensor(37.0 * 3, device=DEVICE))  # every query gives 1


@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 20]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_are_zero_and_disturb_nobody(backend, counts, poisoned):
    layer = paged(LENGTHS)
    batch, q = packed(layer, counts, 2)
    padded = dataclasses.replace(batch, rows=batch.rows.where(batch.rows != 1, -1))
    options = {"scale": 0.5, "longest": 150, "backend": backend}
    got, want = weigh(layer, padded, q, **options), weigh(layer, batch, q, **options)
    assert (got[1] == 0).all() and want[1].any()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_hands_over_its_log_sum_exp(backend):
    """prefill -> place -> weigh, twice, then a decode step: the same sums as where weigh finds it alone."""
    pool = PagePool(40, page_size=16, head_dim=16, dtype=torch.float32, device=DEVICE)
    layer = RaggedCache(pool, [0], kv_heads=2, rows=2, max_tokens=128).layer(0)
    rows = torch.tensor([1, 0], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    for counts in ([30, 7], [40, 33], [1, 1]):
        batch = batch_of(rows, counts)
        q, k, v = (torch.randn(sum(counts), n, 16, generator=generator).to(DEVICE) for n in (6, 2, 2))
        if batch.longest > 1:
            _, lse = prefill(layer, batch, q, k, v, scale=0.6, return_lse=True, backend=backend)
        place(layer, batch, k, v, backend="reference")
        if batch.longest == 1:
            lse = decode(layer, rows, q, scale=0.6, return_lse=True, backend=backend).lse
        options = {"scale": 0.6, "longest": 80, "backend": backend}
        assert torch.allclose(weigh(layer, batch, q, lse=lse, **options), weigh(layer, batch, q, **options), atol=1e-5)


@pytest.mark.parametrize("counts", [[5, 1, 20], [1, 1, 1]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_added_to_what_is_remembered(backend, counts):
    """To the slots that the rows hold, up to the longest asked for, and to no others."""
    layer = paged(LENGTHS)
    batch, q = packed(layer, counts, 2)
    batch = dataclasses.replace(batch, rows=batch.rows.where(batch.rows != 1, -1))
    options = {"scale": 0.5, "longest": 100, "backend": backend}
    state = torch.rand(len(layer.kv) + 1, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    sums, want = weigh(layer, batch, q, **options), state.clone()
    for b, row in enumerate(batch.rows.tolist()):
        for h, length in enumerate(layer.lengths[row].tolist() if row >= 0 else []):
            for slot in range(min(length, 100)):
                want[layer.pages[row, h, slot // 16], slot % 16] += sums[b, h, slot]
    assert weigh(layer, batch, q, into=state, **options) is state
    assert torch.equal(state, want)
    with pytest.raises(ValueError, match=r"into is \(2, 16\); this cache needs"):
        weigh(layer, batch, q, into=state[:2], **options)


def test_strided_queries():
    layer = paged(LENGTHS)
    batch, q = packed(layer, COUNTS, 2)
    strided = torch.stack([q, q], dim=2)[:, :, 0]
    options = {"scale": 0.5, "longest": 150, "backend": "triton"}
    assert torch.equal(weigh(layer, batch, strided, **options), weigh(layer, batch, q, **options))


@pytest.mark.parametrize("counts", [COUNTS, [1, 1, 1, 1]])
def test_the_host_asks_the_device_nothing(counts, monkeypatch):
    layer = paged(LENGTHS)
    batch, q = packed(layer, counts, 2)
    options = {"scale": 0.5, "longest": 150, "backend": "triton"}
    want = weigh(layer, batch, q, **options)

    def refuse(*args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__index__", "__float__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    if DEVICE == "cpu":  # what the interpreter itself does to run a kernel
        monkeypatch.setattr(Tensor, "cpu", lambda self: self)
    got = weigh(layer, batch, q, **options)
    monkeypatch.undo()
    assert torch.equal(got, want)


def test_refusals_name_the_reason():
    layer = paged([[5, 5]])
    batch, q = packed(layer, [3], 1)

    def run(*, layer: LayerPages = layer, q: Tensor = q, batch: Batch = batch, lse: Tensor | None = None) -> None:
        weigh(layer, batch, q, scale=1.0, longest=5, lse=lse, backend="triton")

    with pytest.raises(ValueError, match=r"q is \(3, 2, 8\); expected \[tokens, a multiple of 2 heads, 16\]"):
        run(q=q[..., :8])
    with pytest.raises(ValueError, match="q has 3 tokens; a decode step has one for each of its 1 rows"):
        run(batch=batch_of(batch.rows, [1]))
    with pytest.raises(ValueError, match=r"lse is \(3, 1\); expected \(3, 2\)"):
        run(lse=torch.zeros(3, 1, device=DEVICE))
    with pytest.raises(ValueError, match="a layer without a ring"):
        run(layer=dataclasses.replace(layer, ring=torch.zeros(1, 2, 4, dtype=torch.int32, device=DEVICE)))
    with pytest.raises(ValueError, match="float64"):
        run(q=q.double())
    with pytest.raises(ValueError, match="power of two, not 12"):
        run(layer=dataclasses.replace(layer, kv=layer.kv[:, :, :12].contiguous()))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        weigh(layer, batch, q, scale=1.0, longest=5, backend="cuda")


@pytest.mark.gpu
def test_one_cuda_graph_serves_all_lengths():
    layer = paged([[400, 900], [7, 2000], [1500, 0]], dim=128, page_size=32, dtype=torch.bfloat16)
    batch, q = packed(layer, [1, 1, 1], 4)

    def step() -> Tensor:
        lse = decode(layer, batch.rows, q, scale=0.1, return_lse=True).lse
        return weigh(layer, batch, q, scale=0.1, longest=2000, lse=lse)

    step()
    torch.cuda.synchronize()
    compiled = len(triton._weigh.device_caches[torch.cuda.current_device()][0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    full = layer.lengths.clone()
    for share in (1, 3, 50):
        layer.lengths.copy_(full // share)
        graph.replay()
        want, lse = dense(layer, batch, q, 0.1, 2000)
        assert within_budget(got, dense(layer, batch, q, 0.1, 2000, torch.float32)[0], want, lse)
    assert len(triton._weigh.device_caches[torch.cuda.current_device()][0]) == compiled


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "group"), [(64, 4), (80, 5), (128, 1), (128, 8), (256, 2)])
def test_at_size(dim, group):
    layer = paged([[3000, 1100], [33, 5000]], dim=dim, page_size=32, dtype=torch.bfloat16)
    for counts in ([1024, 32], [1, 1]):
        for known in (True, False):
            check(layer, *packed(layer, counts, group), scale=dim**-0.5, longest=5000, known=known)
