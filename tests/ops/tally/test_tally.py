"""tally counts what a loop over the heads counts, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paging import DEVICE
from sparsekv.ops.tally import BACKENDS, tally


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(
    layers=st.integers(1, 5),
    rows=st.integers(1, 4),
    heads=st.integers(1, 40),
    size=st.sampled_from([3, 4, 32]),
    longest=st.integers(0, 200),
    free=st.integers(-3, 9),
)
def test_it_counts(backend, layers, rows, heads, size, longest, free):
    """Also below zero, where pages ran short."""
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(longest + 1, (layers, rows, heads), generator=generator, dtype=torch.int32)
    seen = torch.randint(300, (layers, rows), generator=generator, dtype=torch.int32)
    count = torch.tensor([free], dtype=torch.int32)
    found = tally(lengths.to(DEVICE), seen.to(DEVICE), count.to(DEVICE), page_size=size, backend=backend).tolist()
    for row in range(rows):
        want = [int(seen[0, row]), 0, *[0] * size]
        for length in lengths[:, row].flatten().tolist():
            want[1] += -(-length // size)
            want[2 + length % size] += 1
        assert found[row] == want
    assert found[rows] == [free, *[0] * (size + 1)]
    assert len(found) == rows + 1


def test_a_backend_by_name_never_falls_back():
    table = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1).int()
    with pytest.raises(ValueError, match="unknown backend 'cuda'; use one of reference, triton"):
        tally(*table, page_size=4, backend="cuda")
