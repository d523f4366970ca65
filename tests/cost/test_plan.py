"""Plans: what fits is what fits, energy and money follow from seconds, and mistakes are one sentence."""

import math

import pytest

from sparsekv.cost import (
    HARDWARE,
    MAX_CONTEXT,
    Limits,
    Rates,
    chains,
    kv_bytes,
    largest_batch,
    largest_context,
    plan,
    shape_of,
    weight_bytes,
)
from sparsekv.cost.fit import fits

LLAMA, H100 = shape_of("llama3.1-8b"), HARDWARE["h100-sxm"]


@pytest.mark.parametrize("limits", [Limits(memory=40e9), Limits(memory=80e9, seconds=8e-3)])
@pytest.mark.parametrize("ratio", [1, 4.5])
def test_the_largest_fits_and_one_more_does_not(limits, ratio):
    def fit(batch, context):
        return fits(LLAMA, H100, batch=batch, context=context, ratio=ratio, limits=limits)

    batch = largest_batch(LLAMA, H100, context=8192, ratio=ratio, limits=limits)
    assert batch > 0 and fit(batch, 8192) and not fit(batch + 1, 8192)
    context = largest_context(LLAMA, H100, batch=8, ratio=ratio, limits=limits)
    assert context > 0 and fit(8, context) and not fit(8, context + 1)


def test_the_largest_batch_by_hand():
    memory = weight_bytes(LLAMA, held=True) + 10 * kv_bytes(LLAMA, batch=1, context=4096)
    assert largest_batch(LLAMA, H100, context=4096, ratio=1, limits=Limits(memory=memory)) == 10
    assert largest_batch(LLAMA, H100, context=4096, ratio=1, limits=Limits(memory=memory - 1)) == 9
    assert largest_batch(LLAMA, H100, context=4096, ratio=8, limits=Limits(memory=memory)) == 80


def test_nothing_fits_a_latency_below_that_of_the_weights():
    limits = Limits(memory=80e9, seconds=1e-3)
    assert largest_batch(LLAMA, H100, context=1, ratio=1, limits=limits) == 0
    assert not plan(LLAMA, H100, batch=1, context=1, limits=limits).fits


def test_the_context_ends_at_a_million():
    limits = Limits(memory=HARDWARE["cpu"].memory)
    assert largest_context(LLAMA, HARDWARE["cpu"], batch=1, ratio=8, limits=limits) == MAX_CONTEXT
    assert plan(LLAMA, HARDWARE["cpu"], batch=1, context=MAX_CONTEXT).fits


def test_chains_are_the_largest_batches():
    limits = Limits(memory=80e9)
    found = chains(LLAMA, H100, contexts=[4096, 8192], ratios=[1, 8], limits=limits)
    assert [(row["context"], row["ratio"]) for row in found] == [(4096, 1), (4096, 8), (8192, 1), (8192, 8)]
    for row in found:
        assert row["chains"] == largest_batch(LLAMA, H100, context=row["context"], ratio=row["ratio"], limits=limits)


def test_energy_carbon_and_price_follow_from_seconds():
    made = plan(LLAMA, H100, batch=16, context=8192, ratio=4, rates=Rates(grams_per_kwh=400, price_per_hour=2.5))
    hours = 1e6 / made.tokens_per_second / 3600
    assert made.joules_per_token * 16 == pytest.approx(700 * made.seconds)
    assert made.grams_per_million_tokens == pytest.approx(0.7 * hours * 400)
    assert made.price_per_million_tokens == pytest.approx(2.5 * hours)


def test_without_rates_nothing_is_made_up():
    made = plan(LLAMA, H100, batch=1, context=1)
    assert made.grams_per_million_tokens is None and made.price_per_million_tokens is None


def test_dense_of_the_paper_does_not_fit_and_a_ratio_of_8_does():
    dense, eight = (plan(LLAMA, H100, batch=256, context=8192, ratio=ratio) for ratio in (1, 8))
    assert not dense.fits and eight.fits
    assert dense.kv_share > eight.kv_share > 0.5
    assert eight.largest_batch == pytest.approx(8 * dense.largest_batch, abs=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"context": 0}, "context is 0"),
        ({"context": MAX_CONTEXT + 1}, "1,048,576"),
        ({"ratio": 0.99}, "from 1"),
        ({"ratio": math.nan}, "from 1"),
        ({"ratio": 8193}, "to the context's tokens"),
        ({"limits": Limits(memory=81e9)}, "ask for less"),
        ({"limits": Limits(memory=15e9)}, "take a smaller model"),
        ({"limits": Limits(memory=80e9, seconds=0)}, "above 0"),
        ({"limits": Limits(memory=80e9, seconds=math.nan)}, "above 0"),
    ],
)
def test_mistakes_are_one_sentence(options, words):
    with pytest.raises(ValueError, match=words) as error:
        plan(LLAMA, H100, **{"batch": 1, "context": 8192} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rates", [{"grams_per_kwh": -1}, {"price_per_hour": math.nan}])
def test_rates_are_not_negative(rates):
    with pytest.raises(ValueError, match="0 or more"):
        Rates(**rates)


def test_weights_that_do_not_fit_name_what_they_fit():
    with pytest.raises(ValueError, match=r"131\.4 GiB.*b200, cpu") as error:
        plan(shape_of("llama3.1-70b"), H100, batch=1, context=1)
    assert "h200" not in str(error.value)
