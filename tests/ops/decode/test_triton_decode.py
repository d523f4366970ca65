"""The decode kernel: its error is that of eager attention in the same type, whatever the lengths and the cut."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paging import DEVICE, paged, within_budget
from sparsekv.ops import layout
from sparsekv.ops.decode import decode, triton
from sparsekv.ops.decode.api import Decoded
from sparsekv.ops.decode.triton import DecodeConfig
from sparsekv.ops.layout import LayerPages

LENGTHS = [[0, 111], [1, 31], [32, 33], [63, 0]]
SMALL = DecodeConfig(block=16, programs=3, least=16)


def queries(layer: LayerPages, group: int, batch: int) -> Tensor:
    heads, dim = layer.lengths.shape[1], layer.kv.shape[-1]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads * group, dim, generator=generator).to(DEVICE, layer.kv.dtype)


def exact(layer: LayerPages, rows: Tensor, q: Tensor, scale: float) -> Decoded:
    """The reference in float64."""
    wide = dataclasses.replace(layer, kv=layer.kv.double())
    return decode(wide, rows, q.double(), scale=scale, return_lse=True, backend="reference")


def eager(layer: LayerPages, rows: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention as a model writes it, every operation in the query's type: output, log-sum-exp."""
    heads = layer.lengths.shape[1]
    q = q.unflatten(1, (heads, -1))
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    for b, row in enumerate(rows.tolist()):
        for h in range(heads):
            length = int(layer.lengths[row, h]) if row >= 0 else 0
            if length:
                k, v = layer.kv[layer.pages[row, h].long()].transpose(0, 1).flatten(1, 2)[:, :length].to(q.dtype)
                scores = q[b, h] @ k.T * scale
                lse[b, h], out[b, h] = scores.logsumexp(-1), scores.softmax(-1) @ v
    return out.flatten(1, 2), lse.flatten(1, 2)


def check(layer: LayerPages, rows: Tensor, q: Tensor, *, scale: float, config: DecodeConfig | None = None) -> None:
    result = decode(layer, rows, q, scale=scale, return_lse=True, backend="triton", config=config)
    want = exact(layer, rows, q, scale)
    assert within_budget(result.out, eager(layer, rows, q, scale)[0], want.out, want.lse)
    _, lse = eager(layer, rows, q.float(), scale)  # scores are float32 however keys are stored
    assert within_budget(result.lse, lse, want.lse, want.lse, terms=1.0)
    heads = layer.lengths.shape[1]
    length = torch.where(rows[:, None] >= 0, layer.lengths[rows], 0).repeat_interleave(q.shape[1] // heads, 1)
    assert (result.out[length == 0] == 0).all()
    assert not layer.tickets.any()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh floating-point memory holds NaN, so that an element left unwritten shows."""

    def fill(make):
        def poisoned_make(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return poisoned_make

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))


@pytest.mark.parametrize(
    ("dim", "group", "page_size", "dtype"),
    [
        (64, 3, 32, torch.float16),
        (64, 4, 16, torch.bfloat16),
        (80, 1, 16, torch.float16),
        (96, 8, 32, torch.float16),
        (128, 4, 32, torch.bfloat16),
        (128, 5, 64, torch.float32),
        (256, 2, 16, torch.float16),
        (16, 20, 32, torch.float32),
    ],
)
def test_error_is_that_of_eager_attention(dim, group, page_size, dtype, poisoned):
    layer = paged(LENGTHS, dim=dim, page_size=page_size, dtype=dtype)
    rows = torch.tensor([2, 0, -1, 3, 1], device=DEVICE)
    check(layer, rows, queries(layer, group, 5), scale=dim**-0.5)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.lists(st.integers(0, 70), min_size=2, max_size=2), min_size=1, max_size=3),
    programs=st.integers(1, 12),
    least=st.sampled_from([16, 32]),
    block=st.sampled_from([16, 32]),
    group=st.integers(1, 3),
)
def test_any_cut_of_any_lengths(lengths, programs, least, block, group):
    layer = paged(lengths, page_size=16)
    config = DecodeConfig(block=block, programs=programs, least=least)
    check(
        layer, torch.arange(len(lengths), device=DEVICE), queries(layer, group, len(lengths)), scale=0.7, config=config
    )


def test_more_heads_than_are_read_at_once(monkeypatch):
    monkeypatch.setattr(triton, "MOST_LANES", 4)
    layer = paged(LENGTHS)
    check(layer, torch.tensor([3, 1, -1, 0, 2], device=DEVICE), queries(layer, 2, 5), scale=0.5, config=SMALL)


@pytest.mark.parametrize(("group", "at_once"), [(20, 1), (16, 2)])
def test_more_pieces_of_a_head_than_are_merged_at_once(group, at_once, monkeypatch):
    """Wide heads of large groups are merged a few pieces a time, the last time not as many."""
    layer = paged([[197, 0]], dim=256)
    launched = []
    kernel = triton._decode

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (launched.append(options["STEP"]), kernel[grid](*args, **options))

    monkeypatch.setattr(triton, "_decode", Spy())
    config = DecodeConfig(block=16, programs=5, least=16)  # 13 units in five shares
    check(layer, torch.tensor([0], device=DEVICE), queries(layer, group, 1), scale=0.06, config=config)
    assert launched == [at_once]


def test_large_scores_do_not_overflow():
    layer = paged(LENGTHS)
    rows, q = torch.arange(4, device=DEVICE), queries(layer, 2, 4)
    assert exact(layer, rows, q, 100.0).lse.max() > 1000
    check(layer, rows, q, scale=100.0, config=SMALL)


def test_without_tickets_of_the_cache_and_with_a_strided_query():
    layer = paged(LENGTHS)
    rows, q = torch.arange(4, device=DEVICE), queries(layer, 2, 4)
    strided = torch.stack([q, q], dim=2)[:, :, 0]
    alone = decode(dataclasses.replace(layer, tickets=None), rows, strided, scale=0.5, backend="triton", config=SMALL)
    assert torch.equal(alone.out, decode(layer, rows, q, scale=0.5, backend="triton", config=SMALL).out)


def test_refusals_name_the_reason(monkeypatch):
    rows, layer = torch.tensor([0], device=DEVICE), paged([[5, 5]])
    q = queries(layer, 1, 1)
    with pytest.raises(ValueError, match="float64"):
        decode(layer, rows, q.double(), scale=1.0, backend="triton")
    odd = dataclasses.replace(layer, kv=layer.kv[:, :, :12].contiguous())
    with pytest.raises(ValueError, match="power of two, not 12"):
        decode(odd, rows, q, scale=1.0, backend="triton")
    monkeypatch.setattr(layout, "interpreting", lambda: False)
    on_cpu = dataclasses.replace(layer, **{f: getattr(layer, f).cpu() for f in ("kv", "pages", "lengths", "tickets")})
    with pytest.raises(ValueError, match="CUDA device, these are on cpu"):
        decode(on_cpu, rows.cpu(), q.cpu(), scale=1.0, backend="triton")
    monkeypatch.setattr(layout, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        decode(layer, rows, q, scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        decode(layer, rows, q, scale=1.0, backend="cuda")


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
    """Captured once, replayed as lengths change; nothing waits for the device and nothing is compiled anew."""
    layer = paged([[400, 900], [7, 2000], [1500, 0]], dim=128, page_size=32, dtype=torch.bfloat16)
    rows, q = torch.arange(3, device=DEVICE), queries(layer, 4, 3)
    decode(layer, rows, q, scale=0.1)
    torch.cuda.synchronize()
    compiled = len(triton._decode.device_caches[torch.cuda.current_device()][0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), waiting_is_an_error():
        out = decode(layer, rows, q, scale=0.1).out
    full = layer.lengths.clone()
    for share in (1, 3, 50):
        layer.lengths.copy_(full // share)
        graph.replay()
        want = exact(layer, rows, q, 0.1)
        assert within_budget(out, eager(layer, rows, q, 0.1)[0], want.out, want.lse)
    assert len(triton._decode.device_caches[torch.cuda.current_device()][0]) == compiled
    assert not layer.tickets.any()


@pytest.mark.gpu
def test_the_last_to_arrive_sees_all_pieces():
    """Hundreds of concurrent pieces, many times over: a merge that read stale memory would show."""
    lengths = torch.randint(0, 6000, (16, 8), generator=torch.Generator().manual_seed(3)).tolist()
    layer = paged(lengths, dim=128, page_size=32, dtype=torch.bfloat16)
    rows, q = torch.arange(16, device=DEVICE), queries(layer, 4, 16)
    want, same_type = exact(layer, rows, q, 0.1), eager(layer, rows, q, 0.1)[0]
    for _ in range(200):
        assert within_budget(decode(layer, rows, q, scale=0.1).out, same_type, want.out, want.lse)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """Pages more than 2 ** 31 elements into the pool."""
    layer = paged([[100, 40]], dim=128, page_size=32, dtype=torch.bfloat16)
    first = 2**31 // layer.kv[0].numel()
    far = torch.empty(first + layer.kv.shape[0], *layer.kv.shape[1:], dtype=torch.bfloat16, device=DEVICE)
    far[first:] = layer.kv
    moved = dataclasses.replace(layer, kv=far, pages=layer.pages + first)
    rows, q = torch.tensor([0], device=DEVICE), queries(layer, 4, 1)
    assert torch.equal(decode(moved, rows, q, scale=0.1).out, decode(layer, rows, q, scale=0.1).out)
