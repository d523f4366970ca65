"""Real eviction against a dense forward with the hard mask, in float64: whole, in chunks, padded, forked, in turns."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekv
from helpers import FAMILIES, check_pages, dms_model, oracle_logits, random_heads, tiny_model, tokens
from sparsekv import SparseCache

LENGTH, WINDOW = 30, 4
EXACT = {"rtol": 0, "atol": 1e-9}


@functools.cache
def llama():
    return dms_model(window=WINDOW)


@functools.cache
def truth(rows: int = 3):
    """The oracle's logits of the texts tokens(rows, LENGTH)."""
    return torch.cat([oracle_logits(llama(), row[None], window=WINDOW) for row in tokens(rows, LENGTH)])


@torch.no_grad()
def run(model, ids, cuts=(), cache=None, **kwargs):
    """Logits of ids fed in parts that end at `cuts`."""
    cache = SparseCache(model, page_size=4) if cache is None else cache
    parts = ids.tensor_split(sorted(cuts), dim=1)
    return torch.cat([model(x, past_key_values=cache, **kwargs).logits for x in parts if x.shape[1]], dim=1)


@pytest.mark.parametrize(("window", "lag"), [(1, 0), (4, 0), (4, 1), (1, 1), (40, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_equals_a_dense_forward_with_the_hard_mask(family, window, lag):
    model, ids = dms_model(family, window=window, lag=lag), tokens(1, LENGTH)
    expected = oracle_logits(model, ids, window=window, lag=lag)
    cache = SparseCache(model, page_size=4)
    assert torch.allclose(run(model, ids, [11, *range(20, LENGTH)], cache), expected, **EXACT)
    with torch.no_grad():  # the training mask, hard, is inference
        assert torch.allclose(model(ids).logits, expected, **EXACT)
    assert (cache.stats().compression_ratio > 1.2) == (window < LENGTH or family == "Gemma3")
    check_pages(cache.ragged)


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=8, unique=True), page_size=st.integers(1, 9))
def test_any_split_of_the_prompt_gives_the_same(cuts, page_size):
    ids, cache = tokens(1, LENGTH), SparseCache(llama(), page_size=page_size)
    assert torch.allclose(run(llama(), ids, cuts, cache), truth()[:1], **EXACT)
    check_pages(cache.ragged)


@pytest.mark.parametrize("decoded", [1, 9, LENGTH - 1, LENGTH])
def test_prefill_and_decode_give_what_prefill_gives(decoded):
    cuts = range(LENGTH - decoded, LENGTH)
    assert torch.allclose(run(llama(), tokens(1, LENGTH), cuts), truth()[:1], **EXACT)


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_nothing_and_everything_marked(bias, window):
    """Everything marked is a sliding window; a prompt shorter than the window keeps everything."""
    model, ids = dms_model(window=window, bias=bias), tokens(2, LENGTH)
    cache = SparseCache(model, page_size=4)
    out = run(model, ids, [7, 28, 29], cache)
    for row in range(2):
        assert torch.allclose(out[row], oracle_logits(model, ids[row : row + 1], window=window)[0], **EXACT)
    held = min(window, LENGTH) if bias > 0 else LENGTH
    assert cache.stats().held == [[2 * held] * 2] * 2
    assert cache.stats().compression_ratio == LENGTH / held


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_extreme_logits_and_scores(scale):
    """Attention scores near 10^4 and logits near 100, where a softmax without a maximum overflows."""
    model, ids = dms_model(window=WINDOW), tokens(1, LENGTH)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= scale
        layer.self_attn.k_proj.weight.data *= 5
    model.lm_head.weight.data *= 30
    out = run(model, ids, [7, 25, 26])
    assert out.abs().max() > 50
    assert torch.allclose(out, oracle_logits(model, ids, window=WINDOW), rtol=0, atol=1e-8)


# Batches


def padded(lengths, side, total=LENGTH):
    """The rows of tokens(3, LENGTH), cut to lengths and padded to `total`."""
    ids, mask = torch.zeros(3, total, dtype=torch.int64), torch.zeros(3, total, dtype=torch.int64)
    for row, n in enumerate(lengths):
        place = slice(total - n, total) if side == "left" else slice(0, n)
        ids[row, place] = tokens(3, LENGTH)[row, :n]
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=10)
@given(lengths=st.tuples(*[st.integers(0, 20)] * 3).filter(any), cut=st.integers(1, 19))
def test_rows_of_a_padded_batch_equal_the_same_prompt_alone(side, lengths, cut):
    """Prefill in two chunks, then four decode steps; a row that is padding throughout gives no NaN."""
    model, cache = llama(), SparseCache(llama(), page_size=4)
    ids, mask = padded(lengths, side, total=20)
    outs = []
    with torch.no_grad():
        for start, end in ((0, cut), (cut, 20)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]  # as generate counts them
            outs.append(run(model, ids[:, start:end], (), cache, attention_mask=mask[:, :end], position_ids=positions))
        whole = torch.cat(outs, dim=1)
        assert torch.isfinite(whole).all()
        for row, n in enumerate(lengths):
            assert torch.allclose(whole[row, mask[row].bool()], truth()[row, :n], **EXACT)
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            position = torch.tensor(lengths) + step
            token = tokens(3, LENGTH)[torch.arange(3), position][:, None]
            out = model(token, attention_mask=mask, past_key_values=cache, position_ids=position[:, None]).logits
            assert torch.allclose(out[:, 0], truth()[torch.arange(3), position], **EXACT)
    assert cache.stats().tokens_seen == sum(lengths) + 12
    check_pages(cache.ragged)


@torch.no_grad()
def test_padding_during_decode_is_no_token():
    """A finished row goes on as padding: nothing of it is stored, and it can speak again."""
    model, cache, ids = llama(), SparseCache(llama(), page_size=4), tokens(2, LENGTH)
    run(model, ids[:, :10], cache=cache)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 10] = 0
    out = model(ids[:, 10:11], attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(out[0], truth()[0, 10:11], **EXACT)
    mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    token = torch.stack([ids[0, 11:12], ids[1, 10:11]])
    out = model(token, attention_mask=mask, past_key_values=cache, position_ids=torch.tensor([[11], [10]])).logits
    assert torch.allclose(out[0], truth()[0, 11:12], **EXACT)
    assert torch.allclose(out[1], truth()[1, 10:11], **EXACT)


@settings(max_examples=10)
@given(indices=st.lists(st.integers(0, 2), min_size=1, max_size=6), at=st.integers(5, 20))
@torch.no_grad()
def test_a_forked_sample_equals_the_same_sample_alone(indices, at):
    """Rows are forked after a prefill, go their own ways, and are forked again in the middle of a page."""
    model, cache, ids = llama(), SparseCache(llama(), page_size=4), tokens(3, LENGTH)
    run(model, ids[:, :at], cache=cache)
    texts = ids[:, :at]
    for choice, steps in ((torch.tensor(indices), 3), (torch.arange(len(indices)).repeat_interleave(2), 5)):
        cache.batch_select_indices(choice)
        texts = texts[choice]
        check_pages(cache.ragged)
        new = tokens(len(texts), steps, seed=steps)
        out, texts = run(model, new, range(1, steps), cache), torch.cat([texts, new], dim=1)
        for row in range(len(texts)):
            expected = run(model, texts[row : row + 1])[0, -steps:]
            assert torch.allclose(out[row], expected, **EXACT)
    assert cache.stats().tokens_seen == texts.numel()


def test_repeat_interleave_shares_the_prompt():
    cache = SparseCache(llama(), page_size=2)
    run(llama(), tokens(1, LENGTH), cache=cache)
    one = cache.stats()
    cache.batch_repeat_interleave(4)
    four = cache.stats()
    assert four.tokens_held == 4 * one.tokens_held
    assert four.pages < 2 * one.pages
    assert four.compression_ratio == one.compression_ratio


# Statistics


@torch.no_grad()
def test_statistics_are_counted():
    """Held, read and peak against the oracle's rule, with everything marked: each head holds min(t, window)."""
    model, cache = dms_model(window=5, bias=1e3), None
    cache = SparseCache(model, page_size=4)
    with pytest.raises(ValueError, match="the cache is empty: run a forward with past_key_values=cache first"):
        cache.stats()
    run(model, tokens(2, 3), cache=cache)
    assert cache.stats().kv_reads == 0  # reads count generation
    run(model, tokens(2, 7, seed=1), range(1, 7), cache)
    stats = cache.stats()
    assert stats.tokens_seen == 20
    assert stats.tokens_held == stats.peak_tokens == 10
    assert stats.compression_ratio == 2
    assert stats.kv_reads == (4 + 5 * 6) * 2  # steps x rows
    assert stats.reads == [[34 * 2] * 2] * 2  # by layer and head
    assert stats.held == [[10, 10], [10, 10]]
    assert stats.ratio_per_head == [[2.0, 2.0], [2.0, 2.0]]
    assert stats.pages == 2 * 2 * 2 * 2  # rows x layers x heads, two pages each
    assert stats.bytes == stats.pages * 2 * 4 * 8 * 8
    assert stats.to_dict()["tokens_seen"] == 20
    cache.reset()
    assert (cache.stats().pages, cache.stats().compression_ratio, cache.stats().kv_reads) == (0, 1.0, 0)
    assert cache.get_seq_length() == 0


def test_the_dial_runs_from_dense_to_the_window():
    model = dms_model(window=WINDOW)
    ratios = []
    for offset in (-math.inf, -1.0, 0.0, 1.0, math.inf):
        sparsekv.modeling.attach.attachment_of(model).policy.offset = offset
        cache = SparseCache(model)
        run(model, tokens(1, LENGTH), cache=cache)
        ratios.append(cache.stats().compression_ratio)
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (1, LENGTH / WINDOW)


def test_one_model_serves_many_caches():
    first, second = SparseCache(llama()), SparseCache(llama())
    ids = tokens(2, LENGTH)
    outs = [
        (run(llama(), ids[:1, i : i + 3], cache=first), run(llama(), ids[1:, i : i + 3], cache=second))
        for i in range(0, LENGTH, 3)
    ]
    for row, parts in enumerate(zip(*outs, strict=True)):
        assert torch.allclose(torch.cat(parts, dim=1)[0], truth()[row], **EXACT)


@torch.no_grad()
def test_float32_marks_do_not_depend_on_the_model_dtype():
    model = random_heads(_attached(tiny_model(dtype=torch.bfloat16)))
    z = sparsekv.inspect(model, tokens(1, 9)).logits
    assert z.dtype == torch.float32
    assert not torch.equal(z, z.bfloat16().float())


def _attached(model):
    sparsekv.attach(model, policy="dms", window=WINDOW)
    return model
