"""DMC against its list implementation: every slot, outputs, reads; in batches, in any chunks, padded, forked."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from helpers import check_pages
from oracles import random_inputs
from policies.driving import DIM, GROUP, HEADS, LAYER, Driven
from policies.test_methods import ROWS, sessions
from sparsekv import dmc
from sparsekv.attend import Part
from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import Batch
from sparsekv.policies.dmc import DMCPolicy

SHAPE = {"heads": HEADS, "group": GROUP}


def policy(**options: Any) -> DMCPolicy:
    return DMCPolicy([lambda hidden: hidden[..., :HEADS]] * 3, **options)


def drawn(seed: int, total: int, *, merging: float) -> tuple[tuple[Tensor, ...], dmc.BeforeRope]:
    """Queries, keys and values; and what is read before RoPE, which turns nothing here."""
    qkv = random_inputs(seed, total, heads=HEADS, group=GROUP, dim=DIM)
    generator = torch.Generator().manual_seed(seed)
    merge = merging - torch.rand(total, HEADS, generator=generator, dtype=torch.float64)
    importance = torch.rand(total, HEADS, generator=generator, dtype=torch.float64) + 0.01
    cos, sin = torch.ones(total, DIM).double(), torch.zeros(total, DIM).double()
    return qkv, dmc.BeforeRope(merge, importance, qkv[1], cos, sin)


def agree(driven: Driven, oracle: oracles.DMC, row: int) -> None:
    """Slot by slot, keys and values."""
    layer = driven.executor.ragged.layer(LAYER)
    held = gather_slots(layer, row, layer.lengths[row].tolist())
    for slots, (keys, values) in zip(oracle.slots, held, strict=True):
        torch.testing.assert_close(keys, torch.stack([slot.key for slot in slots]))
        torch.testing.assert_close(values, torch.stack([slot.value for slot in slots]))
    check_pages(driven.executor.ragged)


@settings(max_examples=15)
@given(sessions((2, 14)), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), st.integers(0, 2**16))
def test_equals_its_list_implementation(session: tuple, merging: float, seed: int) -> None:
    prompts, decoded, cuts = session
    totals = [sum(turn[row] for turn in prompts) + sum(decoded) for row in range(ROWS)]
    drawings = [drawn(seed + row, totals[row], merging=merging) for row in range(ROWS)]
    driven = Driven(policy=policy(), inputs=[(*qkv, read.pack()) for qkv, read in drawings])
    models = [oracles.DMC(**SHAPE) for _ in range(ROWS)]

    def given_to(row: int, at: Any) -> dict[str, Any]:
        (query, key, value), read = drawings[row]
        named = {"query": query, "key": key, "value": value, "merge": read.merge > 0, "weights": read.importance}
        return {name: x[at] for name, x in named.items()}

    for turn, counts in enumerate(prompts):
        start = list(driven.placed)
        outs = driven.prompt(counts, cuts[turn])
        for row, model in enumerate(models):
            expected = model.prompt(**given_to(row, slice(start[row], start[row] + counts[row])))
            torch.testing.assert_close(outs[row], expected)
            agree(driven, model, row)
        for _ in range(decoded[turn]):
            at, before = list(driven.placed), [driven.reads(row) for row in range(ROWS)]
            outs = driven.run([1] * ROWS)
            for row, model in enumerate(models):
                torch.testing.assert_close(outs[row][0], model.decode(**given_to(row, at[row])))
                agree(driven, model, row)
                assert [a - b for a, b in zip(driven.reads(row), before[row], strict=True)] == model.reads[-1]


def test_padded_rows_of_a_graph_change_nothing() -> None:
    """A decode step of row 1 beside two places of -1, as a small batch in a large bucket."""
    drawings = [drawn(row, 9, merging=0.7) for row in range(2)]
    inputs = [(*qkv, read.pack()) for qkv, read in drawings]
    plain, padded = (Driven(policy=policy(), inputs=inputs) for _ in range(2))
    for driven in (plain, padded):
        driven.prompt([8, 8], [])
    expected, out = _step(plain, [1]), _step(padded, [-1, 1, -1])
    torch.testing.assert_close(out[1], expected[0])
    ours, theirs = (d.executor.ragged.row_state[LAYER] for d in (padded, plain))
    assert all(torch.equal(ours[name][:-1], theirs[name][:-1]) for name in ours)


def _step(driven: Driven, rows: list[int]) -> Tensor:
    query, key, value, hidden = (torch.stack([driven.inputs[row][i][8] for row in rows]) for i in range(4))
    batch = Batch(rows=torch.tensor(rows), starts=torch.arange(len(rows) + 1, dtype=torch.int32), longest=1)
    part = Part(batch=batch, seen=torch.full((len(rows),), 8, dtype=torch.int32), tokens=len(rows), most=9)
    return driven.executor.run(LAYER, part, [hidden, query, key, value], DIM**-0.5)


def test_the_offset_dials_from_dense_to_one_slot() -> None:
    qkv, read = drawn(0, 20, merging=0.5)
    for offset, held in ((-torch.inf, 20), (torch.inf, 1)):
        driven = Driven(policy=policy(offset=offset), inputs=[(*qkv, read.pack())])
        driven.prompt([12], [5])
        for _ in range(8):
            driven.run([1])
        assert driven.executor.ragged.lengths[LAYER, 0].tolist() == [held] * HEADS


def test_a_mean_reaches_back_at_least_to_its_token() -> None:
    with pytest.raises(ValueError, match="reach is 0; it counts the current token"):
        policy(reach=0)
