"""Both backends write what a loop over the requests writes, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paging import DEVICE
from sparsekv.integrations.vllm.worker.fill import BACKENDS, BEYOND, Step, Target, fill

REQUESTS, PLACES, OLD = 5, 9, 77


def target() -> Target:
    """As a step before left it."""
    return Target(
        rows=torch.full((PLACES,), OLD, dtype=torch.int64, device=DEVICE),
        seen=torch.full((PLACES,), OLD, dtype=torch.int32, device=DEVICE),
        split=torch.full((2, REQUESTS + 1), OLD, dtype=torch.int64, device=DEVICE),
        starts=torch.full((REQUESTS + 2,), OLD, dtype=torch.int32, device=DEVICE),
    )


def tensor(values: list[int], kind: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=kind, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(
    decodes=st.integers(0, REQUESTS),
    chunks=st.lists(st.integers(1, 9), max_size=2),
    padding=st.integers(0, 3),
    dummy=st.booleans(),
)
def test_every_place(backend, decodes, chunks, padding, dummy):
    """Decodes, chunks, and what a graph is padded by, up to more places than there are requests."""
    counts = [1] * decodes + chunks[: REQUESTS - decodes]
    real, counts = len(counts), [*counts, *[0] * padding]
    total, count = sum(counts), len(counts)
    if not count:
        return
    starts = [sum(counts[:i]) for i in range(count + 1)]
    before = [10 * (i + 1) for i in range(real)] + [0] * padding
    slots = [-1] * (total + padding) if dummy else [*range(total), *[-1] * padding]
    blocks = torch.full((count, 3), OLD, dtype=torch.int32, device=DEVICE)
    blocks[:, 0] = tensor([7 - i for i in range(count)])
    step = Step(
        blocks=blocks,
        slots=tensor(slots, torch.int64),
        starts=tensor(starts),
        after=tensor([b + n for b, n in zip(before, counts, strict=True)]),
        decodes=decodes,
    )
    found = target()
    fill(step, found, backend=backend)
    rows = [-1 if dummy or i >= real else 6 - i for i in range(count)]
    assert found.rows.tolist() == rows + [OLD] * (PLACES - count)
    assert found.seen.tolist() == before + [OLD] * (PLACES - count)
    if count > REQUESTS:
        assert (found.split == OLD).all() and (found.starts == OLD).all()
        return
    rows += [-1] * (REQUESTS + 1 - count)
    assert found.split.tolist() == [
        [row if i < decodes else -1 for i, row in enumerate(rows)],
        [row if i >= decodes else -1 for i, row in enumerate(rows)],
    ]
    assert found.starts.tolist() == starts + [BEYOND] * (REQUESTS + 1 - count)


def test_a_backend_by_name_never_falls_back():
    step = Step(blocks=tensor([1])[:, None], slots=tensor([0]), starts=tensor([0, 1]), after=tensor([1]), decodes=1)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; use one of reference, triton"):
        fill(step, target(), backend="cuda")
