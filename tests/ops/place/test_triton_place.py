"""The placement kernels store what the reference stores, in the same pages' worth of memory, in any order of slots."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.ops.layout import Batch, LaterMarks, LayerPages, LinearMarks, batch_of, ring_positions
from sparsekv.ops.place import place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, DIM = 2, 5


def empty(*, rows: int = 3, window: int = 3, page_size: int = 4, columns: int = 12, count: int = 80) -> LayerPages:
    """A layer that holds nothing, over a shuffled free list; its rings still hold marks of sequences long gone."""
    free = torch.randperm(count, generator=torch.Generator().manual_seed(0)).int()
    zeros = {"pages": (rows, HEADS, columns), "lengths": (rows, HEADS), "seen": (rows,)}
    return LayerPages(
        kv=torch.full((count, 2, page_size, DIM), torch.nan, device=DEVICE),
        free=free.to(DEVICE),
        free_count=torch.tensor([count], dtype=torch.int32, device=DEVICE),
        ring=torch.full((rows, HEADS, window), 3 << 1 | 1, dtype=torch.int32, device=DEVICE),
        **{name: torch.zeros(shape, dtype=torch.int32, device=DEVICE) for name, shape in zeros.items()},
    )


def named_tokens(tokens: int, first: int) -> tuple[Tensor, Tensor]:
    """k, v [T, HEADS, DIM] in which every number tells token, head and dimension; v = -k."""
    number = torch.arange(first, first + tokens)[:, None, None] * 100
    k = (number + torch.arange(HEADS)[:, None] * 10 + torch.arange(DIM)).float().to(DEVICE)
    return k, -k


def slots_of(layer: LayerPages, row: int, head: int) -> Tensor:
    """[length, 2, DIM]: what a head holds, in slot order."""
    size, length = layer.page_size, int(layer.lengths[row, head])
    table = layer.pages[row, head, : -(-length // size)].long()
    return layer.kv[table].transpose(1, 2).flatten(0, 1)[:length]


def check_equal(got: LayerPages, want: LayerPages) -> None:
    """Same tokens in every head, same counts, same marks, and ring entries that point at their tokens."""
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.seen, want.seen)
    assert torch.equal(got.free_count, want.free_count)
    positions = ring_positions(want.seen, want.window)
    for row in range(len(want.seen)):
        known = positions[row] >= 0
        assert torch.equal(got.ring[row][:, known] & 1, want.ring[row][:, known] & 1)
        for head in range(HEADS):
            ours, theirs = slots_of(got, row, head), slots_of(want, row, head)
            assert torch.equal(ours[:, 0], -ours[:, 1])
            assert torch.equal(ours[:, 0, 0].sort().values, theirs[:, 0, 0].sort().values)
            assert torch.equal(ours, ours[:, :, :1] + ours[:, :, :1].sign() * torch.arange(DIM, device=DEVICE))
            entries = got.ring[row, head][known].long() >> 1, want.ring[row, head][known].long() >> 1
            assert torch.equal(ours[entries[0]], theirs[entries[1]])


def check_conserved(layer: LayerPages) -> None:
    """Every page is free or in one table, once."""
    owned = [
        layer.pages[row, head, : -(-int(layer.lengths[row, head]) // layer.page_size)]
        for row in range(len(layer.seen))
        for head in range(HEADS)
    ]
    every = torch.cat([*owned, layer.free[: int(layer.free_count)]]).long()
    assert torch.equal(every.sort().values, torch.arange(len(layer.kv), device=DEVICE))


class Twins:
    """The same calls on a layer of the kernels and a layer of the reference."""

    def __init__(self, **shape: int) -> None:
        self.got, self.want = empty(**shape), empty(**shape)
        self.tokens = 1

    def place(self, batch: Batch, **options) -> None:
        k, v = named_tokens(int(batch.starts[-1]), self.tokens)
        self.tokens += len(k)
        place(self.got, batch, k, v, backend="triton", **options)
        place(self.want, batch, k, v, backend="reference", **options)
        check_equal(self.got, self.want)
        check_conserved(self.got)


def decode_batch(rows: list[int]) -> Batch:
    return batch_of(torch.tensor(rows, device=DEVICE), [1] * len(rows))


def random_marks(tokens: int, seed: int, share: float = 0.6) -> Tensor:
    return (torch.rand(tokens, HEADS, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


STEP = st.one_of(
    st.tuples(st.just("decode"), st.permutations([0, 1, 2]), st.lists(st.booleans(), min_size=3, max_size=3)),
    st.tuples(st.just("prefill"), st.permutations([0, 1, 2]), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
)


@settings(max_examples=25)
@given(steps=st.lists(STEP, min_size=1, max_size=5), window=st.integers(0, 5), seed=st.integers(0, 99))
def test_mixed_steps_with_random_marks(steps, window, seed):
    """Rows in any order, padded decode slots, empty and long chunks (longer than the window), no ring at all."""
    twins = Twins(window=window)
    for index, (kind, rows, detail) in enumerate(steps):
        if kind == "decode":
            batch = decode_batch([row if real else -1 for row, real in zip(rows, detail, strict=True)])
        else:
            batch = batch_of(torch.tensor(rows, device=DEVICE), detail)
        marks = random_marks(int(batch.starts[-1]), seed + index) if window else None
        twins.place(batch, marks=marks)


@pytest.mark.parametrize("window", [1, 7])
def test_chunks_longer_than_a_tile(window, monkeypatch):
    from sparsekv.ops.place import triton

    monkeypatch.setattr(triton, "TILE", 4)
    twins = Twins(window=window, columns=20, count=150)
    for seed, counts in enumerate([[23, 5, 0], [1, 14, 30], [2, 2, 2]]):
        batch = batch_of(torch.tensor([2, 0, 1], device=DEVICE), counts)
        twins.place(batch, marks=random_marks(sum(counts), seed))


def test_everything_marked_stays_at_the_window():
    twins = Twins(window=3)
    for _ in range(9):
        twins.place(decode_batch([0, 1]), marks=torch.ones(2, HEADS, dtype=torch.bool, device=DEVICE))
    assert twins.got.lengths[:2].eq(3).all()


@pytest.mark.parametrize("hidden_size", [7, 64])
def test_marks_made_in_the_kernel(hidden_size):
    """Same marks as the reference makes, with an offset that changes between steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEADS, hidden_size, generator=generator).to(DEVICE)
    twins = Twins(window=2)
    for offset in (0.0, 0.0, -1e9, 1e9, 0.0, 1e9, 0.0):
        hidden = torch.randn(3, hidden_size, generator=generator).to(DEVICE, torch.bfloat16)
        offset = torch.full((1,), offset, device=DEVICE)
        marks = LinearMarks(hidden=hidden, weight=weight, bias=torch.tensor([0.3, -0.3], device=DEVICE), offset=offset)
        twins.place(decode_batch([1, 2, 0]), marks=marks)
    chunk = torch.randn(9, hidden_size, generator=generator).to(DEVICE)
    twins.place(batch_of(torch.tensor([0, 1], device=DEVICE), [4, 5]), marks=dataclasses.replace(marks, hidden=chunk))


def test_all_tokens_but_the_first_are_marked_in_the_kernel():
    """Rows of different ages: the same as marks by position."""
    twins, given_ = Twins(window=2), Twins(window=2)
    twins.place(batch_of(torch.tensor([1], device=DEVICE), [2]))
    given_.place(batch_of(torch.tensor([1], device=DEVICE), [2]))
    for _ in range(6):
        marks = (given_.got.seen[[1, 0]] >= 3)[:, None].expand(-1, HEADS)
        twins.place(decode_batch([1, 0]), marks=LaterMarks(first=3))
        given_.place(decode_batch([1, 0]), marks=marks)
        check_equal(twins.got, given_.got)
    assert twins.got.lengths[:2].eq(5).all()


@pytest.mark.parametrize("window", [0, 3])
def test_chosen_slots_override_the_ring(window):
    twins = Twins(window=window)
    twins.place(batch_of(torch.tensor([0, 1], device=DEVICE), [4, 6]))
    for slots in ([[0, -1], [5, 2]], [[-1, -1], [-1, 3]], [[4, 4], [0, 0]]):
        twins.place(decode_batch([0, 1]), slots=torch.tensor(slots, dtype=torch.int32, device=DEVICE))


def test_keys_and_values_inside_a_fused_projection():
    """k and v with any distance between tokens, as a fused projection leaves them."""
    layers = empty(), empty()
    k, v = named_tokens(4, 1)
    fused = torch.stack([k, v, v], dim=1)
    for layer, pair in zip(layers, ((fused[:, 0], fused[:, 1]), (k, v)), strict=True):
        place(layer, batch_of(torch.tensor([0, 1], device=DEVICE), [1, 1]), pair[0][:2], pair[1][:2], backend="triton")
        place(layer, batch_of(torch.tensor([0], device=DEVICE), [2]), pair[0][2:], pair[1][2:], backend="triton")
    check_equal(*layers)


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 9, 7]])
def test_a_pool_too_small_shows_and_nothing_else_is_touched(counts):
    """A head that finds no page keeps what it had; other heads' pages and the pool's edges stay as they were."""
    layer = empty(count=5, page_size=4)
    rows = torch.arange(3, device=DEVICE)
    place(layer, batch_of(rows[:2], [4, 4]), *named_tokens(8, 1), backend="triton")
    guarded = layer.kv[layer.pages[:2, :, 0].long()].clone()
    place(layer, batch_of(rows, counts), *named_tokens(sum(counts), 9), backend="triton")
    assert int(layer.free_count) < 0
    assert torch.equal(layer.kv[layer.pages[:2, :, 0].long()], guarded)
    assert int((-(-layer.lengths // 4)).sum()) <= 5
    for row in range(3):
        for head in range(HEADS):
            held = slots_of(layer, row, head)
            assert torch.equal(held[:, 0], -held[:, 1])


@pytest.mark.parametrize("count", [1, 6])
def test_a_page_table_too_narrow_shows_as_a_pool_too_small(count):
    layer = empty(columns=1, page_size=4, rows=2)
    neighbour = layer.pages[1].clone()
    row = torch.tensor([0], device=DEVICE)
    place(layer, batch_of(row, [4]), *named_tokens(4, 1), backend="triton")
    place(layer, batch_of(row, [count]), *named_tokens(count, 5), backend="triton")
    assert int(layer.free_count) < 0
    assert layer.lengths[0].tolist() == [4, 4]
    assert torch.equal(layer.pages[1], neighbour)


def test_refusals_name_the_reason():
    layer = empty(rows=1)
    wide = dataclasses.replace(layer, pages=torch.zeros(1, 200, 2).int(), lengths=torch.zeros(1, 200).int())
    k = torch.zeros(1, 200, DIM, device=DEVICE)
    with pytest.raises(ValueError, match="at most 127 KV heads, not 200"):
        place(wide, decode_batch([0]), k, k, backend="triton")
    with pytest.raises(ValueError, match="marks need a layer with a ring"):
        place(empty(window=0), decode_batch([0]), k, k, marks=random_marks(1, 0), backend="triton")


@contextmanager
def waiting_is_an_error():
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("marks", ["none", "given", "linear"])
def test_a_decode_step_is_one_cuda_graph(marks):
    """Captured under sync_debug_mode error, replayed many times, equal to the reference at the end."""
    twins = Twins(window=4, columns=64, count=400)
    rows, (k, v) = decode_batch([2, -1, 0]), named_tokens(3, 1)
    weight = torch.randn(HEADS, 64, device=DEVICE)
    linear = LinearMarks(
        hidden=torch.randn(3, 64, device=DEVICE),
        weight=weight,
        bias=torch.zeros(HEADS, device=DEVICE),
        offset=torch.zeros(1, device=DEVICE),
    )
    options = {"marks": {"none": None, "given": random_marks(3, 1), "linear": linear}[marks]}
    place(empty(window=4, columns=64, count=400), rows, k, v, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), waiting_is_an_error():
        place(twins.got, rows, k, v, **options)
    for step in range(100):
        new = named_tokens(3, 1 + 3 * step)
        k.copy_(new[0])
        v.copy_(new[1])
        linear.hidden.normal_()
        graph.replay()
        place(twins.want, rows, *new, **options, backend="reference")
    check_equal(twins.got, twins.want)
    check_conserved(twins.got)


@pytest.mark.gpu
def test_a_prefill_does_not_wait_for_the_device():
    twins = Twins(window=4, columns=300, count=2000)
    counts = [700, 0, 1000]
    batch, new, marks = batch_of(torch.arange(3, device=DEVICE), counts), named_tokens(1700, 1), random_marks(1700, 0)
    place(empty(window=4, columns=300, count=2000), batch, *new, marks=marks)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        place(twins.got, batch, *new, marks=marks)
    place(twins.want, batch, *new, marks=marks, backend="reference")
    check_equal(twins.got, twins.want)
    check_conserved(twins.got)
