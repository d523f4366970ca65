"""The prefill kernel equals dense attention under the rule of visibility, to the error of eager attention.

The oracle knows nothing of pages, slots or rings: it keeps every token of each sequence and masks the full square.
"""

from dataclasses import dataclass

import pytest
import torch
import triton as triton_language
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops import layout
from sparsekv.ops.layout import Batch, LayerPages, batch_of
from sparsekv.ops.place import place
from sparsekv.ops.prefill import compact, prefill, reference, triton
from sparsekv.ops.prefill.triton import PrefillConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = 3
"""How many times the error of eager attention in the same type the kernel may have, both against float64."""
SMALL = PrefillConfig(rows=16, keys=16, slots=16, warps=4, stages=2)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """T packed tokens of the sequences of a batch."""

    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    marks: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A layer in which earlier chunks are stored, and the chunk to attend for."""

    layer: LayerPages
    past: list[Chunk]
    chunk: Chunk

    def run(self, *, config: PrefillConfig | None = SMALL) -> Tensor:
        c = self.chunk
        return prefill(
            self.layer, c.batch, c.q, c.k, c.v, scale=scale_of(c.q), marks=c.marks, backend="triton", config=config
        )


def scene(
    *counts: list[int],
    heads: int = 2,
    group: int = 2,
    dim: int = 16,
    window: int = 5,
    page_size: int = 8,
    marked: float = 0.6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Scene:
    """Chunks of counts[i] tokens per sequence, all but the last stored. Unwritten slots hold NaN, unwritten ring
    entries the marks of an earlier sequence."""
    generator = torch.Generator().manual_seed(seed)
    sequences, most = len(counts[0]), sum(max(chunk) for chunk in counts)
    pages = (sequences + 1) * heads * (most // page_size + 1)
    pool = PagePool(pages, page_size=page_size, head_dim=dim, dtype=dtype, device=DEVICE)
    pool.kv.fill_(torch.nan)
    pool.free[:-1] = torch.randperm(pages, generator=generator)
    layer = RaggedCache(pool, [window], kv_heads=heads, rows=sequences + 1, max_tokens=most).layer(0)
    layer.ring.fill_(2 * 3 + 1)
    rows = torch.arange(sequences, 0, -1, device=DEVICE)

    def chunk(count: list[int]) -> Chunk:
        q, k, v = (
            torch.randn(sum(count), n, dim, generator=generator).to(DEVICE, dtype)
            for n in (heads * group, heads, heads)
        )
        marks = (torch.rand(sum(count), heads, generator=generator) < marked).to(DEVICE) if window else None
        return Chunk(batch=batch_of(rows, count), q=q, k=k, v=v, marks=marks)

    *past, last = (chunk(count) for count in counts)
    for c in past:
        place(layer, c.batch, c.k, c.v, marks=c.marks, backend="reference")
    return Scene(layer=layer, past=past, chunk=last)


def scale_of(q: Tensor) -> float:
    return 2 * q.shape[-1] ** -0.5


def dense(scene: Scene, dtype: torch.dtype) -> Tensor:
    """[T, H * G, D]: attention by the masked square, every operation in dtype."""
    return _square(scene, dtype)[0]


def log_sum_exp(scene: Scene, dtype: torch.dtype) -> Tensor:
    """[T, H * G]: that of each query's scores, likewise."""
    return _square(scene, dtype)[1]


def _square(scene: Scene, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, heads, window = scene.chunk.q, scene.layer.lengths.shape[1], scene.layer.window
    out = torch.zeros_like(q, dtype=dtype).unflatten(1, (heads, -1))
    lse = torch.full_like(out[..., 0], -torch.inf)
    for i, row in enumerate(scene.chunk.batch.rows.tolist()):
        if row < 0:
            continue
        history = [
            (
                c.k[s:e],
                c.v[s:e],
                torch.zeros_like(c.k[s:e, :, 0], dtype=torch.bool) if c.marks is None else c.marks[s:e],
            )
            for c in (*scene.past, scene.chunk)
            for s, e in [c.batch.starts[i : i + 2].tolist()]
        ]
        k, v, marks = (torch.cat(parts).transpose(0, 1) for parts in zip(*history, strict=True))  # [H, n, ...]
        start, end = scene.chunk.batch.starts[i : i + 2].tolist()
        age = torch.arange(k.shape[1], device=DEVICE)
        age = age[k.shape[1] - (end - start) :, None] - age
        visible = (age >= 0) & (~marks[:, None] | (age < window))
        query = q[start:end].unflatten(1, (heads, -1)).permute(1, 2, 0, 3).to(dtype)
        scores = (query @ k[:, None].mT.to(dtype) * scale_of(q)).masked_fill(~visible[:, None], -torch.inf)
        out[start:end] = (scores.softmax(-1) @ v[:, None].to(dtype)).permute(2, 0, 1, 3)
        lse[start:end] = scores.logsumexp(-1).permute(2, 0, 1)
    return out.flatten(1, 2), lse.flatten(1, 2)


def assert_right(scene: Scene, *, config: PrefillConfig | None = SMALL) -> None:
    """At most BUDGET times as far from the exact result as eager attention is, or as one rounding of it."""
    got, eager, exact = scene.run(config=config), dense(scene, scene.chunk.q.dtype), dense(scene, torch.float64)
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return
    rounding = torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= BUDGET * torch.maximum((eager - exact).abs().max(), rounding)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN or, where it counts, nonsense, so that an element left unwritten shows."""

    def fill(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

        return poisoned

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))


@pytest.mark.parametrize(
    ("dim", "group", "page_size", "dtype"),
    [
        (64, 3, 32, torch.float16),
        (64, 1, 16, torch.bfloat16),
        (80, 5, 16, torch.float16),
        (96, 7, 24, torch.bfloat16),
        (128, 4, 32, torch.bfloat16),
        (128, 4, 64, torch.float32),
        (256, 2, 8, torch.float16),
    ],
)
def test_every_head_size_in_its_tuned_cut(dim, group, page_size, dtype):
    assert_right(
        scene([20, 3], [31, 1], dim=dim, group=group, page_size=page_size, dtype=dtype, window=16), config=None
    )


@pytest.mark.parametrize("window", [1, 16, 40, 300])
@pytest.mark.parametrize("marked", [0.0, 0.5, 1.0])
def test_windows_and_shares_of_marks(window, marked):
    """Odd counts, among them a prompt shorter than the window; nothing and everything marked."""
    assert_right(scene([30, 0, 17], [63, 31, 1], window=window, marked=marked, heads=1))


@pytest.mark.parametrize("count", [32, 33, 73])
def test_the_last_block_has_all_its_window_before_it(count):
    """Blocks of 8 queries: the window of a last one of one query begins with the last token that is counted,
    which with 73 tokens opens a block of 64."""
    assert_right(scene([count], window=9, heads=1, group=2, marked=0.3))


def test_long_prompts():
    assert_right(scene([257, 111], window=31, heads=1, marked=0.8))


def test_without_a_ring():
    assert_right(scene([30, 7], [63, 33], window=0))


def test_a_ring_but_no_marks_in_this_chunk():
    s = scene([30, 9], [33, 5], window=12)
    c = s.chunk
    plain = Scene(
        layer=s.layer, past=s.past, chunk=Chunk(batch=c.batch, q=c.q, k=c.k, v=c.v, marks=torch.zeros_like(c.marks))
    )
    without = prefill(s.layer, c.batch, c.q, c.k, c.v, scale=scale_of(c.q), backend="triton", config=SMALL)
    assert_right(plain)
    assert torch.allclose(without, plain.run(), atol=1e-5)


def test_stored_marked_tokens_expire_inside_the_chunk():
    """All of 20 stored tokens are marked with a window of 24: query i of the chunk sees the last 23 - i of them."""
    s = scene([20], [40], window=24, marked=1.0, heads=1, group=1)
    assert int(s.layer.lengths.max()) == 20
    assert_right(s)
    alone = scene([0], [40], window=24, marked=1.0, heads=1, group=1)
    same_chunk = Scene(layer=alone.layer, past=[], chunk=s.chunk)
    differs = (s.run() != same_chunk.run()).any(-1).any(-1)
    assert differs[:23].all()
    assert torch.allclose(s.run()[23:], same_chunk.run()[23:], atol=1e-6)


@settings(max_examples=15)
@given(
    window=st.integers(0, 30),
    marked=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    counts=st.lists(st.lists(st.integers(0, 24), min_size=2, max_size=2), min_size=1, max_size=4),
    group=st.integers(1, 3),
    page_size=st.sampled_from([4, 40]),
    seed=st.integers(0, 9),
)
def test_any_history(window, marked, counts, group, page_size, seed):
    """Slots that later chunks reused, rings that wrapped, tokens that expired between chunks."""
    assert_right(scene(*counts, window=window, marked=marked, group=group, page_size=page_size, seed=seed, heads=1))


def test_rows_of_minus_one_give_zeros():
    s = scene([12, 9], [20, 17], window=7)
    rows = s.chunk.batch.rows.clone()
    rows[0] = -1
    batch = Batch(rows=rows, starts=s.chunk.batch.starts, longest=20)
    padded = Scene(
        layer=s.layer, past=s.past, chunk=Chunk(batch=batch, q=s.chunk.q, k=s.chunk.k, v=s.chunk.v, marks=s.chunk.marks)
    )
    out = padded.run()
    assert (out[:20] == 0).all()
    assert torch.equal(out[20:], s.run()[20:])
    c = padded.chunk
    reference = prefill(s.layer, batch, c.q, c.k, c.v, scale=scale_of(c.q), marks=c.marks, backend="reference")
    assert torch.allclose(out, reference, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("counts", "window", "dtype"),
    [
        ([[30, 7], [63, 33]], 0, torch.float32),
        ([[30, 0, 17], [9, 20, 4], [63, 31, 1]], 16, torch.float16),
        ([[12], [40], [73]], 40, torch.bfloat16),
    ],
)
def test_log_sum_exp(counts, window, dtype, backend, monkeypatch):
    """With marks and rings, chunk after chunk; the output stays what it is without. A row of -1 has minus infinity."""
    monkeypatch.setattr(reference, "BLOCK", 32)
    s = scene(*counts, window=window, dtype=dtype, heads=1)
    c = s.chunk
    options = {"scale": scale_of(c.q), "marks": c.marks, "backend": backend}
    if backend == "triton":
        options["config"] = SMALL
    out, lse = prefill(s.layer, c.batch, c.q, c.k, c.v, return_lse=True, **options)
    assert torch.equal(out, prefill(s.layer, c.batch, c.q, c.k, c.v, **options))
    eager, exact = log_sum_exp(s, torch.float32), log_sum_exp(s, torch.float64)
    rounding = torch.finfo(torch.float32).eps * (1 + exact.abs().max())
    assert lse.dtype == torch.float32
    assert (lse - exact).abs().max() <= BUDGET * torch.maximum((eager - exact).abs().max(), rounding)
    rows = c.batch.rows.clone()
    rows[0] = -1
    padded = Batch(rows=rows, starts=c.batch.starts, longest=c.batch.longest)
    got = prefill(s.layer, padded, c.q, c.k, c.v, return_lse=True, **options)[1]
    end = counts[-1][0]
    assert (got[:end] == -torch.inf).all()
    assert torch.equal(got[end:], lse[end:])


@pytest.mark.parametrize("kind", ["heads first", "sliced", "odd strides"])
def test_strided_inputs(kind):
    s = scene([12, 9], [20, 17], window=7, heads=3)

    def view(x: Tensor) -> Tensor:
        if kind == "heads first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        pad = 32 if kind == "sliced" else 3
        return torch.nn.functional.pad(x, (0, pad))[..., : x.shape[-1]]

    c = s.chunk
    strided = Chunk(batch=c.batch, q=view(c.q), k=view(c.k), v=view(c.v), marks=c.marks.T.contiguous().T)
    assert not strided.q.is_contiguous()
    assert torch.equal(Scene(layer=s.layer, past=s.past, chunk=strided).run(), s.run())


def test_large_scores_do_not_overflow():
    s = scene([20, 3], [31, 40], window=9)
    s.chunk.q.mul_(100)
    assert dense(s, torch.float64).isfinite().all()
    assert_right(s)


def test_the_host_asks_the_device_nothing(monkeypatch):
    s = scene([12, 9], [20, 17], window=7)
    want = s.run()

    def refuse(*args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__index__", "__float__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    if DEVICE == "cpu":  # what the interpreter itself does to run a kernel
        monkeypatch.setattr(Tensor, "cpu", lambda self: self)
    got = s.run()
    monkeypatch.undo()
    assert torch.equal(got, want)


@triton_language.jit
def _blocks(out, starts, sequences, count, SIZE: tl.constexpr):
    for index in range(0, count):
        sequence, first = compact.block_of(starts, sequences, index, SIZE)
        tl.store(out + 2 * index, sequence)
        tl.store(out + 2 * index + 1, first)


@pytest.mark.parametrize("sequences", [1, 3, compact.SEQUENCES.value, compact.SEQUENCES.value + 20])
def test_each_block_of_each_sequence_has_one_program(sequences):
    """Sequences of no token among them, and more than are looked at at once."""
    counts = [31 * index % 23 if index % 9 == 1 else 0 for index in range(sequences - 1)] + [17]
    batch = batch_of(torch.arange(sequences, device=DEVICE), counts)
    want = [(i, first) for i, count in enumerate(counts) for first in reversed(range(0, count, 8))]
    programs = compact.most_blocks(batch, sum(counts), 8)
    assert len(want) <= programs
    got = torch.empty(len(want) + 1, 2, dtype=torch.int32, device=DEVICE)
    _blocks[(1,)](got, batch.starts, sequences, len(got), 8)
    assert got[:-1].tolist() == [list(block) for block in want]
    assert got[-1, 1] == -1  # beyond the last


def test_more_unmarked_tokens_than_are_counted_at_once():
    """The packing counts what lies before a block of 64 in steps of SCAN tokens."""
    tokens = compact.SCAN.value + 130
    s = scene([tokens], heads=1, group=1, window=3, marked=0.98)
    assert_right(s, config=PrefillConfig(rows=128, keys=128, slots=64, warps=4, stages=2))


def test_refusals_name_the_reason(monkeypatch):
    s = scene([4], [5])
    c = s.chunk

    def run(*, layer: LayerPages = s.layer, q: Tensor = c.q, k: Tensor = c.k, scale: float = 1.0, backend="triton"):
        return prefill(layer, c.batch, q, k, k, scale=scale, marks=c.marks, backend=backend)

    with pytest.raises(ValueError, match="float64"):
        run(q=c.q.double())
    with pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
        run(q=c.q.clone().requires_grad_())
    with pytest.raises(ValueError, match="positive number"):
        run(scale=-1.0)
    odd = scene([4], [5], dim=24)
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        run(layer=odd.layer, q=odd.chunk.q, k=odd.chunk.k)
    no_ring = scene([4], [5], window=0)
    with pytest.raises(ValueError, match="marks need a layer with a ring"):
        run(layer=no_ring.layer)
    monkeypatch.setattr(layout, "interpreting", lambda: False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="CUDA device, these are on cpu"):
            run()


@pytest.mark.gpu
def test_no_length_waits_or_compiles_anew():
    def compiled() -> list[int]:
        kernels = (triton._attend, compact._index_ring, compact._pack_kept)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def attend(*counts: list[int], window: int) -> None:
        s = scene(*counts, window=window, dim=128, group=4, heads=3, page_size=32, dtype=torch.bfloat16)
        s.run(config=None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            s.run(config=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_right(s, config=None)

    attend([40, 7], [100, 16], window=16)
    first = compiled()
    for counts in ([[1], [33]], [[300, 0, 5], [31, 1, 977]], [[64] * 8, [1000] * 8], [[2048], [16]]):
        for window in (1, 7, 64):
            attend(*counts, window=window)
    assert compiled() == first


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (64, 4, torch.bfloat16),
        (80, 5, torch.float16),
        (128, 4, torch.bfloat16),
        (128, 1, torch.float16),
        (256, 2, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("window", [1, 64, 512])
def test_at_size(dim, group, dtype, window):
    s = scene([1500, 0, 777], [1111, 2000, 63], window=window, marked=0.9, dim=dim, group=group, dtype=dtype)
    assert_right(s, config=None)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """Packed keys more than 2 ** 31 elements from the first, in both layouts of the strides."""
    tokens, heads, dim = 2**19 + 1000, 33, 128
    k = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    k[-1000:] = torch.randn(1000, heads, dim, device=DEVICE).to(k.dtype)
    small = scene([1000], heads=heads, group=1, dim=dim, window=64, dtype=torch.bfloat16)
    marks = torch.ones(tokens, heads, dtype=torch.bool, device=DEVICE)
    marks[-1000:] = small.chunk.marks
    rows = torch.tensor([-1, 1], device=DEVICE)
    batch = batch_of(rows, [tokens - 1000, 1000])
    near = batch_of(rows[1:], [1000])
    want = prefill(small.layer, near, k[-1000:], k[-1000:], k[-1000:], scale=0.1, marks=marks[-1000:])
    for x in (k, k.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(prefill(small.layer, batch, x, x, x, scale=0.1, marks=marks)[-1000:], want)
