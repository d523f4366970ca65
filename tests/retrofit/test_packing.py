"""Packed rows: nothing is lost, chats stay whole, and each document is as it would be alone, marks included."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekv
import tiny
from helpers import tiny_model, tokens
from sparsekv.modeling import contexts
from sparsekv.modeling.split import SplitModel
from sparsekv.retrofit.data.packing import joined, pack

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 16))
def test_texts_are_cut_and_nothing_is_lost(lengths: list[int], length: int) -> None:
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    rows = list(pack(iter(documents), length, whole=False))
    packed = np.concatenate([ids for ids, _ in rows]) if rows else np.arange(0)
    assert packed.tolist() == list(range(sum(lengths) // length * length))
    ends = set(np.cumsum(lengths).tolist())
    for row, (ids, numbers) in enumerate(rows):
        assert len(ids) == len(numbers) == length
        borders = {row * length + i for i in range(1, length) if numbers[i] != numbers[i - 1]}
        assert borders == {end for end in ends if row * length < end < (row + 1) * length}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_every_chat_is_whole_somewhere(lengths: list[int]) -> None:
    chats = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    rows = list(pack(iter(chats), 9, whole=True))
    whole = {tuple(ids[numbers == n].tolist()) for ids, numbers in rows for n in range(numbers.max() + 1)}
    placed = [tuple(chat.tolist()) in whole for chat in chats]
    assert sum(len(chat) for chat, found in zip(chats, placed, strict=True) if not found) < 18  # the last, unfilled row


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("soft", [False, True])
def test_a_packed_document_is_what_it_is_alone(lag: int, soft: bool) -> None:
    model = tiny_model()
    sparsekv.attach(model, policy="dms", window=4, lag=lag)
    tiny.random_heads(sparsekv.heads(model), scale=1e5)  # so that the noise of soft gates moves no mark
    split = SplitModel(model)
    parts = [row[: 13 + 9 * i] for i, row in enumerate(tokens(3, 40))]
    ids, numbers = (torch.from_numpy(x)[None] for x in joined([part.numpy() for part in parts]))

    def hidden(ids: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            if not soft:
                return split.hidden(ids, documents=documents)
            with contexts.soft(model, tau=0.1):
                return split.hidden(ids, documents=documents)

    packed = hidden(ids, numbers)[0]
    for n, part in enumerate(parts):
        alone = hidden(part[None], None)[0]
        assert torch.allclose(packed[numbers[0] == n], alone, atol=1e-4)
    crossing = hidden(ids, None)[0]
    assert not torch.allclose(crossing[numbers[0] == 1], packed[numbers[0] == 1], atol=1e-2)
