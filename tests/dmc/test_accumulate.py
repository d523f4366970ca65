"""The hard rule, against plain loops over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekv import dmc

H, D, DV = 2, 3, 5


def naive(key: Tensor, value: Tensor, w: Tensor, merge: Tensor) -> tuple[Tensor, Tensor]:
    """One text, [T, H, ...]: the weighted mean over the tokens of the slot so far, token by token, head by head."""
    keys, values = torch.empty_like(key), torch.empty_like(value)
    for h in range(key.shape[1]):
        first = 0
        for t in range(len(key)):
            if not merge[t, h]:
                first = t
            weights = w[first : t + 1, h, None]
            for x, out in ((key, keys), (value, values)):
                out[t, h] = (weights * x[first : t + 1, h]).sum(0) / weights.sum()
    return keys, values


def draw(total: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(total, H, d, dtype=dtype, generator=g) for d in (D, DV))
    w = torch.rand(total, H, dtype=dtype, generator=g) + 0.01
    return key, value, w, torch.rand(total, H, generator=g) < 0.7


def empty(batch: int, dtype: torch.dtype = torch.float64) -> dmc.Carry:
    """No slots yet; what their means would be is undefined."""
    key, value = (torch.full((batch, H, d), torch.nan, dtype=dtype) for d in (D, DV))
    return dmc.Carry(torch.zeros(batch, H, dtype=dtype), key, value)


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3).filter(
        lambda c: len({len(x) for x in c}) == 1
    ),
    st.integers(0, 2**20),
    st.integers(0, 3),
)
def test_chunked_is_whole_is_the_naive_loop(chunks, seed, slack):
    """chunks[c][i] tokens of sequence i in chunk c, some of them none."""
    batch = len(chunks[0])
    texts = [draw(sum(counts[i] for counts in chunks), seed + i) for i in range(batch)]
    carry, done, got = empty(batch), [0] * batch, [[] for _ in range(batch)]
    for counts in chunks:
        if not sum(counts):
            continue
        pieces = [[x[at : at + n] for x in text] for text, at, n in zip(texts, done, counts, strict=True)]
        packed = [torch.cat(x) for x in zip(*pieces, strict=True)]
        longest = 1 if counts == [1] * batch else max(2, *counts) + slack
        key, value, carry = dmc.accumulate(*packed, carry, starts=starts_of(counts), longest=longest)
        for i, piece in enumerate(zip(key.split(counts), value.split(counts), strict=True)):
            got[i].append(piece)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    for text, pieces in zip(texts, got, strict=True):
        if len(text[0]):
            for mine, wanted in zip(map(torch.cat, zip(*pieces, strict=True)), naive(*text), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_a_decode_step_by_hand():
    """Sequence 0 has a slot of mean 4 and weight 3, sequence 1 has none; head 0 merges a token of weight 1."""
    carry = dmc.Carry(torch.tensor([[3.0, 3], [0, 0]]), torch.full((2, 2, 1), 4.0), torch.full((2, 2, 1), 8.0))
    merge = torch.tensor([[True, False], [True, False]])
    zero, one = torch.zeros(2, 2, 1), torch.ones(2, 2)
    key, value, new = dmc.accumulate(zero, zero + 4, one, merge, carry, starts=starts_of([1, 1]), longest=1)
    assert key[..., 0].tolist() == [[3, 0], [0, 0]]
    assert value[..., 0].tolist() == [[7, 4], [4, 4]]
    assert new.z.tolist() == [[4, 1], [1, 1]]
    assert torch.equal(new.key, key) and torch.equal(new.value, value)


def test_sequences_without_tokens_keep_their_slot():
    carry = dmc.Carry(torch.ones(3, H), torch.randn(3, H, D), torch.randn(3, H, DV))
    new = dmc.accumulate(*draw(2, 0, torch.float32), carry, starts=starts_of([0, 2, 0]), longest=2)[2]
    for before, after in zip(carry, new, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


def test_float32_holds_over_4k_tokens():
    """One slot of 2048 large keys, then slots of small ones, where a difference of sums over all tokens would be noise;
    and one slot of 4096."""
    total, half = 4096, 2048
    key, value, w, merge = draw(total, 0)
    key[:half] += 1e4
    merge[:half, 0], merge[half, 0], merge[:, 1] = True, False, True
    wanted = naive(key, value, w, merge)
    arguments = (key.float(), value.float(), w.float(), merge)
    got = dmc.accumulate(*arguments, empty(1, torch.float32), starts=starts_of([total]), longest=total)
    for mine, right in zip(got[:2], wanted, strict=True):
        torch.testing.assert_close(mine[half:, 0].double(), right[half:, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.double(), right, rtol=3e-7, atol=1e-6)


def test_bfloat16_means_are_rounded_once():
    """256 merges of the same bfloat16 number: a running mean kept in bfloat16 would drift; the carry is float32."""
    carry = empty(1, torch.float32)
    key, value = (torch.full((1, H, d), 0.1, dtype=torch.bfloat16) for d in (D, DV))
    w, merge = torch.full((1, H), 0.7), torch.ones(1, H, dtype=torch.bool)
    for _ in range(256):
        mean, _, carry = dmc.accumulate(key, value, w, merge, carry, starts=starts_of([1]), longest=1)
    assert torch.equal(mean, key)
    assert carry.key.dtype == carry.z.dtype == torch.float32
    torch.testing.assert_close(carry.z, torch.full((1, H), 256 * 0.7), rtol=1e-5, atol=0)


def test_no_value_is_read_on_the_host():
    """On the meta device there are none."""
    with torch.device("meta"):
        for counts, longest in ((2, 1), (7, 4)):
            tensors = torch.ones(counts, H, D), torch.ones(counts, H, DV), torch.ones(counts, H)
            merge, starts = torch.ones(counts, H, dtype=torch.bool), torch.zeros(3, dtype=torch.int32)
            carry = dmc.Carry(torch.ones(2, H), torch.ones(2, H, D), torch.ones(2, H, DV))
            key, value, new = dmc.accumulate(*tensors, merge, carry, starts=starts, longest=longest)
            assert (key.shape, value.shape) == ((counts, H, D), (counts, H, DV))
            assert [x.shape for x in new] == [x.shape for x in carry]
