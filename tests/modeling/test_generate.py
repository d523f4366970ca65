"""Plain `generate`: greedy, sampling, beams, several sequences, padding, chunks, several turns on one cache."""

import pytest
import torch

import sparsekv
from helpers import check_pages, dms_model, oracle_logits, tiny_model, tokens
from sparsekv import SparseCache

NEW = 15


def dense_pair(**config):
    """A model as it is, and its twin attached with nothing marked."""
    ours = tiny_model(dtype=torch.float64, **config)
    sparsekv.attach(ours, policy="dense")
    return tiny_model(dtype=torch.float64, **config), ours


def batch(padding: str = "none"):
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    if padding == "left":
        mask[1, :4] = mask[2, :1] = 0
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20},
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.3, "min_new_tokens": NEW},
    ],
    ids=["greedy", "beams", "more beams", "samples", "chunked", "penalty"],
)
def test_dense_generation_is_transformers_own(options, padding):
    theirs, ours = dense_pair()
    outputs = []
    for model, cache in ((theirs, None), (ours, SparseCache(ours, page_size=4))):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch(padding), max_new_tokens=NEW, past_key_values=cache, **options))
    assert torch.equal(outputs[0], outputs[1])
    check_pages(cache.ragged)


def test_rows_that_end_early():
    theirs, ours = dense_pair()
    stop = int(theirs.generate(**batch(), max_new_tokens=NEW)[0, 12])  # what the first row says fourth
    for model in (theirs, ours):
        model.generation_config.eos_token_id = stop
    out = ours.generate(**batch(), max_new_tokens=NEW, past_key_values=SparseCache(ours))
    assert torch.equal(out, theirs.generate(**batch(), max_new_tokens=NEW))
    assert (out[0, 13:] == 0).all()


def greedy(model, ids: torch.Tensor, steps: int, window: int) -> torch.Tensor:
    """Greedy generation with the oracle, from nothing at each step."""
    for _ in range(steps):
        ids = torch.cat([ids, oracle_logits(model, ids, window=window)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generation_with_eviction_equals_the_oracle():
    model = dms_model(window=3)
    cache = SparseCache(model, page_size=4)
    inputs = batch("left")
    out = model.generate(**inputs, max_new_tokens=NEW, past_key_values=cache)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        prompt = inputs["input_ids"][row, mask][None]
        assert torch.equal(out[row, 9 - int(mask.sum()) :], greedy(model, prompt, NEW, 3)[0])
    assert cache.stats().compression_ratio > 1.2


def test_several_turns_on_one_cache_equal_one_text():
    model = dms_model(window=3)
    cache, text = SparseCache(model, page_size=4), tokens(1, 8)
    expected = text
    for turn in range(3):
        text = model.generate(text, max_new_tokens=5, past_key_values=cache)
        expected = greedy(model, expected, 5, 3)
        assert torch.equal(text, expected)
        more = tokens(1, 4, seed=turn + 1)
        text, expected = torch.cat([text, more], dim=1), torch.cat([expected, more], dim=1)
    assert cache.stats().tokens_seen == text.shape[1] - 4 - 1  # the last token of a turn is seen in the next


def test_samples_of_one_prompt_equal_each_sample_alone():
    """Fork the prompt's cache, then feed each sample's own tokens: log probabilities as if alone."""
    model = dms_model(window=3)
    cache, prompt = SparseCache(model, page_size=4), tokens(1, 11)
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        max_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=4,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4  # no duplicated seeds
    logits = torch.stack(out.logits, dim=1)
    for row, sequence in enumerate(out.sequences):
        expected = oracle_logits(model, sequence[None], window=3)[0, 10:-1]
        assert torch.allclose(logits[row].double(), expected, rtol=0, atol=1e-5)  # generate returns float32


def test_beam_search_with_eviction_follows_its_beams():
    """The score of each returned beam is the sum of the oracle's log probabilities along it."""
    model = dms_model(window=3)
    cache = SparseCache(model, page_size=4)
    out = model.generate(
        tokens(2, 9),
        max_new_tokens=NEW,
        num_beams=3,
        length_penalty=0.0,
        past_key_values=cache,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits = oracle_logits(model, sequence[None], window=3)[0].log_softmax(-1)
        assert float(score) == pytest.approx(float(logits[range(8, 8 + NEW), sequence[9:]].sum()), abs=1e-4)
    check_pages(cache.ragged)


def test_generation_past_the_context_is_refused():
    _, ours = dense_pair(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        ours.generate(**batch(), max_new_tokens=20, past_key_values=SparseCache(ours))
