"""The gate's kernels, forward and backward, have the error of eager attention; the oracle is the reference in float64.

What an edge can be: odd lengths, blocks larger than the text, documents that end inside a block or come in pieces, a
window of one and one beyond the text, gates of minus infinity.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gating import DEVICE, Scene, assert_right, scene
from sparsekv.ops.gate import api, triton
from sparsekv.ops.gate.cuts import Cut, GateConfig

SMALL = GateConfig(
    forward=Cut(queries=32, keys=16, warps=4, stages=2),
    by_query=Cut(queries=16, keys=32, warps=4, stages=2),
    by_key=Cut(queries=16, keys=32, warps=4, stages=2),
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element left unwritten shows."""
    make = Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (16, 1, torch.float32),
        (64, 3, torch.bfloat16),
        (80, 4, torch.float16),
        (96, 2, torch.bfloat16),
        (128, 4, torch.bfloat16),
        (256, 1, torch.bfloat16),
    ],
)
def test_head_sizes_groups_and_types(dim, group, dtype):
    assert_right(scene(45, dim=dim, group=group, heads=2, dtype=dtype, window=7), config=SMALL)


@settings(max_examples=15)
@given(
    length=st.sampled_from([1, 15, 16, 17, 31, 33, 63]),
    window=st.sampled_from([1, 2, 16, 17, 40, 200]),
    kind=st.sampled_from(["none", "soft", "hard"]),
    cuts=st.lists(st.integers(0, 70), max_size=3),
    seed=st.integers(0, 999),
)
def test_lengths_windows_gates_and_documents(length, window, kind, cuts, seed):
    documents = [[sum(i >= cut for cut in cuts) for i in range(length)]] if cuts else None
    assert_right(scene(length, window=window, kind=kind, documents=documents, seed=seed), config=SMALL)


@pytest.mark.parametrize(
    "ids",
    [
        [[0] * 20 + [1] * 30, [1] * 33 + [0] * 17],  # padding on the left, padding on the right
        [[0] * 9 + [1] * 26 + [0] * 15, [0, 1, 2, 1, 0] * 10],  # documents in pieces, which see each other
        [list(range(50)), [7] * 50],  # every token alone, all together
    ],
)
def test_where_documents_lie(ids):
    assert_right(scene(50, rows=2, documents=ids, window=6), config=SMALL)


def test_the_tuned_cuts_too():
    assert_right(scene(70, dim=32, window=20, dtype=torch.bfloat16))
    assert_right(scene(70, dim=32, window=20))


def test_all_marked_gives_finite_gradients_and_none_to_the_gate():
    inputs = scene(40, window=1)
    inputs = Scene(**(vars(inputs) | {"log_keep": torch.full_like(inputs.log_keep, -torch.inf)}))
    out, *gradients = inputs.run(triton.gate, torch.float32, config=SMALL)
    torch.testing.assert_close(out, inputs.v.repeat_interleave(2, 1))  # each query sees itself alone
    assert all(torch.isfinite(g).all() for g in gradients)
    assert not gradients[-1].any()


def test_the_same_bits_again_and_under_checkpointing():
    inputs = scene(50, heads=2, window=9, documents=[[0] * 30 + [1] * 20])

    def recomputed(*args, **kwargs):
        return checkpoint(triton.gate, *args, use_reentrant=False, **kwargs)

    once, again, twice = (inputs.run(f, torch.float32, config=SMALL) for f in (triton.gate, triton.gate, recomputed))
    for a, b, c in zip(once, again, twice, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_compiled_caller_sees_one_operation_and_no_graph_break():
    inputs = scene(20)
    compiled = torch.compile(
        lambda *args, **kwargs: 2 * triton.gate(*args, **kwargs), backend="aot_eager", fullgraph=True
    )
    expected = inputs.run(triton.gate, torch.float32, config=SMALL)
    for ours, theirs in zip(inputs.run(compiled, torch.float32, config=SMALL), expected, strict=True):
        torch.testing.assert_close(ours, 2 * theirs)


def test_only_the_output_and_one_number_a_row_are_kept():
    saved = []
    inputs = scene(200)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        inputs.run(triton.gate, torch.float32, config=SMALL)
    assert max(shape.numel() for shape in saved) == inputs.q.numel()


def test_a_named_backend_that_cannot_run_says_why():
    q = torch.zeros(1, 1, 3, 24, device=DEVICE)
    with pytest.raises(ValueError, match="head size that is a multiple of 16 up to 256, not 24 and 24 for values"):
        api.gate(q, q, q, None, window=1, scale=1.0, backend="triton")
    double = q[..., :16].double()
    with pytest.raises(ValueError, match="throughout, not torch"):
        api.gate(double, double, double, None, window=1, scale=1.0, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "group", "dim", "length"), [(2, 4, 128, 2048), (3, 3, 64, 1999), (1, 2, 256, 1025), (1, 1, 80, 700)]
)
def test_at_real_sizes(heads, group, dim, length):
    sizes = {"heads": heads, "group": group, "dim": dim, "dtype": torch.bfloat16}
    assert_right(scene(length, window=64, **sizes))
    assert_right(scene(length, window=300, kind="hard", **sizes))
    assert_right(scene(length, window=64, kind="none", **sizes))
    assert_right(scene(length, window=64, documents=[[i // 300 for i in range(length)]], **sizes))


@pytest.mark.gpu
def test_the_same_bits_at_real_sizes():
    inputs = scene(3001, heads=8, group=4, dim=128, window=64, dtype=torch.bfloat16)
    once, again = (inputs.run(triton.gate, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu
def test_another_length_compiles_nothing_new():
    sizes = {"heads": 2, "group": 4, "dim": 128, "dtype": torch.bfloat16}
    scene(1024, **sizes).run(triton.gate, torch.bfloat16)
    kernels = (triton.kernels.forward, triton.kernels.keys, triton.kernels.queries, triton.kernels.row_sums)
    before = [len(k.device_caches[0][0]) for k in kernels]
    for length in (1, 129, 1001, 2048):
        scene(length, **sizes).run(triton.gate, torch.bfloat16)
    assert [len(k.device_caches[0][0]) for k in kernels] == before
