"""Ctrl-C at random lines of a plain generate: the cache is then right, or says that it must be reset."""

import random
import sys
from pathlib import Path

import pytest
import torch

import sparsekv
from helpers import check_pages, random_heads, tiny_model, tokens
from sparsekv import SparseCache

OURS = str(Path(sparsekv.__file__).parent)
POLICIES = {"dms": {"window": 3}, "snapkv": {"budget": 33}, "tova": {"budget": 8}, "streaming": {"budget": 8}}
PROMPT, NEW, TRIALS = 40, 5, 20


class Interrupt:
    """Within, KeyboardInterrupt at the n-th line of sparsekv's."""

    def __init__(self, lines: int) -> None:
        self.left = lines

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, kind, *error):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _call(self, frame, event, value):
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame, event, value):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line


def go_on(model, cache, text) -> torch.Tensor:
    """The logits of what the cache lacks of a text: its prompt at once, the rest token by token."""
    seen = cache.get_seq_length()
    cuts = [*([seen] if seen < PROMPT else []), *range(max(seen, PROMPT), text.shape[1])]
    outs = [
        model(text[:, a:b], past_key_values=cache).logits[:, -1]
        for a, b in zip(cuts, [*cuts[1:], text.shape[1]], strict=True)
    ]
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_after_an_interrupt_the_cache_is_right_or_says_so(policy):
    """Chunked prefill, the end of the prompt and decode steps."""
    model, prompt = tiny_model(dtype=torch.float64), tokens(1, PROMPT)
    sparsekv.attach(model, policy=policy, **POLICIES[policy])
    if policy == "dms":
        random_heads(model)

    def generate(cache):
        return model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=24)

    text = generate(SparseCache(model, page_size=4))
    expected = go_on(model, SparseCache(model, page_size=4), text)
    whole = Interrupt(10**9)
    with whole:
        generate(SparseCache(model, page_size=4))
    rng, outcomes = random.Random(0), set()
    for _ in range(TRIALS):
        cache = SparseCache(model, page_size=4)
        with Interrupt(rng.randrange(1, 10**9 - whole.left)):
            generate(cache)
        try:
            found = go_on(model, cache, text)
            outcomes.add("right")
            torch.testing.assert_close(found, expected[:, -found.shape[1] :])
            check_pages(cache.ragged)
        except ValueError as error:
            assert "was interrupted half-way; call cache.reset() and prefill again" in str(error)  # noqa: PT017
            outcomes.add("refused")
        cache.reset()
        assert torch.equal(generate(cache), text)
        check_pages(cache.ragged)
    assert outcomes == {"right", "refused"}


@torch.no_grad()
def test_after_an_interrupted_fork():
    model, prompt = tiny_model(dtype=torch.float64), tokens(2, PROMPT)
    sparsekv.attach(model, policy="streaming", budget=8)
    indices = torch.tensor([0, 1, 1, 0, 1])
    whole = Interrupt(10**9)
    for lines in (10**9, *range(1, 400, 13)):
        cache = SparseCache(model, page_size=4)
        model(prompt, past_key_values=cache)
        before = cache.stats()
        whole = Interrupt(lines)
        with whole:
            cache.batch_select_indices(indices)
        if whole.left > 0:
            continue
        try:
            assert cache.stats() == before  # it had not begun
        except ValueError as error:
            assert "a fork was interrupted half-way; call cache.reset() and prefill again" in str(error)  # noqa: PT017
        cache.reset()
        model(prompt, past_key_values=cache)
        check_pages(cache.ragged)
