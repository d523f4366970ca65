"""The pool exactly full, one page short, and forwards that break off: the cache stays as it was, and usable."""

import pytest
import torch
from torch import Tensor

import sparsekv
from helpers import check_pages, dms_model, oracle_logits, random_heads, tiny_model, tokens
from sparsekv import SparseCache
from sparsekv.cache.state import State
from sparsekv.ops.place import api as place
from sparsekv.policies import Policy

LENGTH, PAGE = 30, 4
PAGE_BYTES = 2 * PAGE * 8 * 8  # keys and values of 4 slots of 8 float64


def run(model, ids, cuts, cache) -> list[Tensor]:
    with torch.no_grad():
        return [model(x, past_key_values=cache).logits for x in ids.tensor_split(list(cuts), dim=1)]


def cache_of(model, pages: int) -> SparseCache:
    return SparseCache(model, kv_memory=pages * PAGE_BYTES, page_size=PAGE)


def needed(model, ids, cuts) -> int:
    """The pages that a run holds at its end; no head ever shrinks, so it is also the most."""
    cache = SparseCache(model, page_size=PAGE)
    run(model, ids, cuts, cache)
    return cache.stats().pages


def snapshot(cache: SparseCache) -> list[Tensor]:
    """Everything that the cache is: lengths, rings, free pages, the policy's state, and each head's slots in order."""
    ragged = cache.ragged
    owned = ragged.owned(torch.arange(ragged.rows))
    ids = ragged.pages[..., : owned.shape[-1]][owned].long()
    slots = torch.arange(PAGE * owned.shape[-1]) < ragged.lengths[..., None]
    live = ragged.pool.kv[ids].transpose(1, 2)[slots.unflatten(-1, (-1, PAGE))[owned]]
    pool = ragged.pool
    free = pool.free[: pool.pages_free].sort().values
    state = [tensor[:-1] for layer in ragged.row_state for tensor in layer.values()]
    state += [tensor[:-1] for tensor in pool.state.values()]
    tensors = [ragged.lengths, ragged.seen, *ragged.rings, free, pool.extra_owners, ids, live, *state]
    return [t.clone() for t in (*tensors, torch.tensor(cache.get_seq_length()))]


def assert_same(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("cuts", [[], [13], [13, *range(20, LENGTH)]], ids=["whole", "chunks", "decode"])
def test_a_pool_exactly_full_gives_the_same(cuts, lag):
    model, ids = dms_model(lag=lag), tokens(2, LENGTH)
    pages = needed(model, ids, cuts)
    cache = cache_of(model, pages)
    assert_same(run(model, ids, cuts, SparseCache(model, page_size=PAGE)), run(model, ids, cuts, cache))
    assert cache.ragged.pool.pages_free == 0
    check_pages(cache.ragged)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("cuts", [[], [13], [13, *range(20, LENGTH)]], ids=["whole", "chunks", "decode"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_pool_one_page_short_is_refused_and_stays_usable(cuts, lag, backend, monkeypatch):
    """The refused forward leaves no trace, whether it is the first, a second chunk or a decode step; nor do kernels,
    which notice a shortage only when they have written what fitted."""
    monkeypatch.setattr(place, "check_backend", lambda *args: backend)
    model, ids = dms_model(lag=lag), tokens(2, LENGTH)
    pages = needed(model, ids, cuts)
    cache = cache_of(model, pages - 1)
    parts = ids.tensor_split(cuts, dim=1)
    message = r"the KV pool is full: .*B \(\d+ pages\) are needed and .* of .* are free; pass a larger kv_memory"
    for part in parts:
        before = snapshot(cache) if cache.get_seq_length() else None
        try:
            run(model, part, [], cache)
        except ValueError:
            break
    with pytest.raises(ValueError, match=message):
        run(model, part, [], cache)
    if before is not None:
        assert_same(before, snapshot(cache))
    done = cache.get_seq_length()
    assert done < LENGTH
    assert cache.stats().pages == 0 or done > 0
    check_pages(cache.ragged)
    fewer = ids[:, : 4 if done == 0 else done + 1]
    if done == 0 or needed(model, fewer, [done]) < pages:
        out = run(model, fewer[:, done:], [], cache)[0]  # and goes on with less
        for row in range(2):
            expected = oracle_logits(model, fewer[row : row + 1], window=4, lag=lag)
            assert torch.allclose(out[row], expected[0, done:], rtol=0, atol=1e-9)


def test_a_decode_step_names_exactly_what_it_needs():
    model, ids = dms_model(bias=-1e3), tokens(1, 9)
    cache = cache_of(model, 2 * 2 * 2)  # two layers, two heads, two pages each: full after eight tokens
    run(model, ids[:, :8], [5], cache)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"2 KiB \(4 pages\) are needed and 0 B of 4 KiB are free"):
        run(model, ids[:, 8:], [], cache)
    assert_same(before, snapshot(cache))


def test_overwriting_needs_no_page():
    """A full pool of which every next token takes a marked one's slot goes on for ever."""
    model, ids = dms_model(bias=1e3, window=4), tokens(1, 60)
    cache = cache_of(model, 2 * 2)
    run(model, ids, range(1, 60), cache)
    assert cache.ragged.pool.pages_free == 0
    assert cache.stats().compression_ratio == 15


class Budget(Policy):
    """Overwrites slot 0 from four slots on, and keeps the last three of a prompt; counts its tokens in its state."""

    prunes = rewrites = True

    def state(self, shape):
        return [
            State(name=name, kind=kind, dtype=torch.int32)
            for name, kind in (("tokens", "row"), ("even", "slot"), ("writes", "page"))
        ]

    def appends(self, pages):
        return pages.lengths < 4

    def slots(self, step, pages):
        return self.appends(pages)[step.batch.rows].int().mul(-1)

    def placed(self, step, pages, slots):
        step.state.row["tokens"][step.batch.rows] += step.batch.counts
        step.state.slot["even"][pages.pages[step.batch.rows].long()] = step.seen[0] % 2
        step.state.page["writes"][pages.pages[step.batch.rows, :, 0].long()] += 1

    def finish_prompt(self, prompt, pages):
        return torch.arange(int(pages.lengths.max())) >= pages.lengths[prompt.rows][..., None] - 3


def test_a_budget_policy_in_a_full_pool():
    """Its prompt needs room before it is pruned; a chunk that does not fit leaves what was pruned before untouched."""
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy=Budget())
    cache = cache_of(model, 2 * 2 * 2 + 1)
    run(model, tokens(1, 8), [], cache)
    assert cache.stats().held == [[8, 8], [8, 8]]
    run(model, tokens(1, 1), [], cache)
    assert cache.stats().held == [[4, 4], [4, 4]]
    assert cache.stats().peak_tokens == 8
    before = snapshot(cache)
    with pytest.raises(ValueError, match="the KV pool is full"):
        run(model, tokens(1, 9), [], cache)
    assert_same(before, snapshot(cache))
    run(model, tokens(1, 5), range(1, 5), cache)
    assert cache.stats().held == [[4, 4], [4, 4]]
    assert cache.ragged.row_state[0]["tokens"][:-1].tolist() == [14]
    check_pages(cache.ragged)


class Merge(Policy):
    """Adds to the last stored token before it appends."""

    def place(self, step, pages, marks):
        last = pages.lengths[0, 0] - 1
        if last >= 0:
            pages.kv[pages.pages[0, :, last // PAGE].long(), :, last % PAGE] += 1
        super().place(step, pages, marks)


def test_a_chunk_that_does_not_fit_leaves_merged_tokens_as_they_were():
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy=Merge())
    cache = cache_of(model, 2 * 2 * 3)
    run(model, tokens(1, 8), [3], cache)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="the KV pool is full"):
        run(model, tokens(1, 6), [], cache)
    assert_same(before, snapshot(cache))


# Forwards that another error interrupts


def test_an_interrupted_prefill_is_taken_back_when_the_next_begins():
    model, ids = dms_model(), tokens(1, LENGTH)
    cache = SparseCache(model, page_size=PAGE)
    run(model, ids[:, :13], [], cache)
    hook = model.model.layers[0].mlp.register_forward_hook(_explode)
    with pytest.raises(RuntimeError, match="boom"):
        run(model, ids[:, 13:20], [], cache)
    hook.remove()
    out = run(model, ids[:, 13:], [10], cache)
    expected = oracle_logits(model, ids, window=4)
    assert torch.allclose(torch.cat(out, dim=1), expected[:, 13:], rtol=0, atol=1e-9)
    check_pages(cache.ragged)


def test_a_fork_after_an_interrupted_prefill_forks_what_was_before():
    model, ids = dms_model(), tokens(1, LENGTH)
    cache = SparseCache(model, page_size=PAGE)
    run(model, ids[:, :13], [], cache)
    before = snapshot(cache)
    hook = model.model.layers[0].mlp.register_forward_hook(_explode)
    with pytest.raises(RuntimeError, match="boom"):
        run(model, ids[:, 13:20], [], cache)
    hook.remove()
    cache.batch_select_indices(torch.tensor([0]))
    assert_same(before, snapshot(cache))


def test_an_interrupted_decode_step_says_what_to_do():
    model, ids = dms_model(), tokens(1, LENGTH)
    cache = SparseCache(model, page_size=PAGE)
    run(model, ids[:, :13], [], cache)
    hook = model.model.layers[0].mlp.register_forward_hook(_explode)
    with pytest.raises(RuntimeError, match="boom"):
        run(model, ids[:, 13:14], [], cache)
    hook.remove()
    with pytest.raises(ValueError, match="a decode step was interrupted half-way"):
        run(model, ids[:, 13:14], [], cache)
    cache.reset()
    out = run(model, ids, [], cache)[0]
    assert torch.allclose(out, oracle_logits(model, ids, window=4), rtol=0, atol=1e-9)
    check_pages(cache.ragged)


def _explode(*args):
    raise RuntimeError("boom")


# Other refusals


def test_a_pool_without_a_page():
    model = random_heads(_dms(tiny_model()))
    with pytest.raises(ValueError, match="kv_memory of 100 B holds no page of 512 B; raise it"):
        run(model, tokens(1, 3), [], SparseCache(model, kv_memory=100, page_size=8))
    with pytest.raises(ValueError, match="'lots' is not a size of memory"):
        SparseCache(model, kv_memory="lots")
    with pytest.raises(ValueError, match="page_size is 0; it counts token slots"):
        SparseCache(model, page_size=0)


def test_text_beyond_the_context():
    model = dms_model(max_position_embeddings=16)
    cache = SparseCache(model)
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16; shorten the text"):
        run(model, tokens(1, 17), [], cache)
    run(model, tokens(1, 16), [8], cache)
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        run(model, tokens(1, 1), [], cache)


def test_another_batch_size():
    model = dms_model()
    cache = SparseCache(model)
    run(model, tokens(2, 5), [], cache)
    with pytest.raises(ValueError, match="the cache holds 2 sequences and the batch has 3; use a new SparseCache"):
        run(model, tokens(3, 1), [], cache)


def test_a_cache_of_another_attachment():
    model = dms_model(window=4)
    cache = SparseCache(model)
    sparsekv.detach(model)
    sparsekv.attach(model, policy="dms", window=9)
    with pytest.raises(ValueError, match=r"this cache was made for another model or policy: make a new SparseCache"):
        run(model, tokens(1, 5), [], cache)


def test_cropping():
    model = dms_model()
    cache = SparseCache(model)
    run(model, tokens(1, 5), [], cache)
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot be cropped, evicted tokens are gone: fork it beforehand instead"):
        cache.crop(-1)


def _dms(model):
    sparsekv.attach(model, policy="dms", window=4)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [1, 2])
def test_kernels_on_a_gpu_leave_no_token_out_where_the_pool_is_short(chunks):
    model = tiny_model(head_dim=16, max_position_embeddings=512, dtype=torch.bfloat16)
    sparsekv.attach(model, policy="dms", window=16)
    model, ids = random_heads(model).cuda(), tokens(2, 256).cuda()
    parts = list(ids.chunk(chunks, dim=1))
    expected = SparseCache(model)
    whole = run(model, ids, [] if chunks == 1 else [128], expected)
    short = SparseCache(model, kv_memory=expected.stats().bytes - expected.ragged.pool.page_bytes)
    for part in parts[:-1]:
        run(model, part, [], short)
    for _ in range(2):
        with pytest.raises(ValueError, match="the KV pool is full"):
            run(model, parts[-1], [], short)
    assert short.get_seq_length() == 256 - parts[-1].shape[1]
    assert short.ragged.pool.pages_free >= 0
    full = SparseCache(model, kv_memory=expected.stats().bytes)
    again = run(model, ids, [] if chunks == 1 else [128], full)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert full.ragged.pool.pages_free == 0
