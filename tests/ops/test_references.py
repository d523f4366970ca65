"""The references at their edges: heads that hold nothing, extreme scores, poisoned memory, bad shapes."""

import pytest
import torch
from torch import Tensor

from helpers import Run, attend
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import PoolExhausted, batch_of
from sparsekv.ops.place import place
from sparsekv.ops.prefill import prefill
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy


def filled(length: int, *, policy: Policy | None = None, **options) -> Run:
    run = Run(policy=policy or Policy(), **options)
    if length:
        run.step([length], hidden=torch.ones(length, 2), query=torch.zeros(length, 2, 2).double())
    return run


def test_a_head_that_holds_nothing_gives_zero():
    """Its log-sum-exp is minus infinity, so that merging partial results gives it weight 0."""
    result = decode(
        filled(0).cache.layer(0),
        torch.tensor([0]),
        torch.ones(1, 2, 2).double(),
        scale=1.0,
        return_lse=True,
    )
    assert torch.equal(result.out, torch.zeros(1, 2, 2).double())
    assert torch.equal(result.lse, torch.full((1, 2), -torch.inf).double())


def test_scores_near_ten_thousand():
    """A softmax that does not subtract the maximum overflows at 88 in float32."""
    run = filled(40)
    query = torch.tensor([[[7.0, 6.0], [-3.0, -5.0]]]).double()  # scores up to 39 * 7 + 39 ** 2 * 6 = 9399
    result = decode(run.cache.layer(0), torch.tensor([0]), query, scale=1.0, return_lse=True)
    expected = torch.stack([attend(q, list(range(40)), scale=1.0) for q in query[0]])
    assert torch.allclose(result.out[0], expected)
    assert torch.allclose(result.lse[0], torch.tensor([9399.0, 0.0]).double(), atol=1e-3)
    kv = torch.full((1, 2, 2), 39.0).double()
    out = prefill(run.cache.layer(0), batch_of(torch.tensor([0]), [1]), query, kv, kv, scale=1.0)
    assert torch.isfinite(out).all()


def test_unwritten_memory_is_never_read():
    """NaN everywhere in the pool but in written slots: none reaches an output."""
    run = Run(policy=DMSPolicy([lambda hidden: hidden], window=3), page_size=4)
    run.cache.pool.kv.fill_(torch.nan)
    generator = torch.Generator().manual_seed(0)
    for count in (5, 1, 1, 7, 1, 2):
        hidden = torch.randn(count, 2, generator=generator)
        assert torch.isfinite(run.step([count], hidden=hidden, query=torch.ones(count, 2, 2).double())).all()


@pytest.mark.parametrize("count", [1, 5])
def test_a_short_pool_is_refused_before_anything_is_written(count):
    run = filled(3, pages=4)  # two heads of two pages each: one slot left in each
    run.step([1], hidden=torch.ones(1, 2), query=torch.zeros(1, 2, 2).double())
    before = snapshot(run)
    with pytest.raises(PoolExhausted, match="are needed and 0 are free"):
        run.step([count], hidden=torch.ones(count, 2), query=torch.zeros(count, 2, 2).double())
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))


def snapshot(run: Run) -> list[Tensor]:
    cache = run.cache
    owned = [cache.pages, cache.lengths, cache.seen, *cache.rings, cache.pool.free, cache.pool.free_count]
    return [x.clone() for x in (*owned, cache.pool.kv)]


def test_keys_and_values_keep_no_graph():
    run = filled(0)
    k = torch.ones(1, 2, 2, dtype=torch.float64, requires_grad=True)
    place(run.cache.layer(0), batch_of(torch.tensor([0]), [1]), k, k)
    assert not run.cache.pool.kv.requires_grad


def test_bad_arguments():
    layer, one = filled(3).cache.layer(0), batch_of(torch.tensor([0]), [1])
    kv = torch.zeros(1, 2, 2).double()
    with pytest.raises(ValueError, match=r"q is \(1, 3, 2\); expected \[1, a multiple of 2 heads, 2\]"):
        decode(layer, torch.tensor([0]), torch.zeros(1, 3, 2).double(), scale=1.0)
    with pytest.raises(ValueError, match="do not fit 2 heads of 2"):
        prefill(layer, one, torch.zeros(1, 2, 2).double(), kv[..., :1], kv[..., :1], scale=1.0)
    with pytest.raises(ValueError, match="marks need a layer with a ring"):
        place(layer, one, kv, kv, marks=torch.ones(1, 2, dtype=torch.bool))
    for call in (
        lambda: decode(layer, torch.tensor([0]), kv, scale=1.0, backend="cuda"),
        lambda: prefill(layer, one, kv, kv, kv, scale=1.0, backend="cuda"),
        lambda: place(layer, one, kv, kv, backend="cuda"),
    ):
        with pytest.raises(ValueError, match="unknown backend 'cuda'; use one of reference"):
            call()
