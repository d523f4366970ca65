"""The cost model: the paper's figures, and what must hold for any shape."""

from dataclasses import replace

import pytest

from sparsekv.cost import HARDWARE, SHAPES, bytes_read, flops, kv_bytes, shape_of, step_seconds, weight_bytes

LLAMA = shape_of("llama3.1-8b")
PARAMETERS = {
    "llama3.1-8b": 8.03, "llama3.1-70b": 70.6, "llama3.2-1b": 1.236, "qwen3-8b": 8.19, "qwen2.5-1.5b": 1.54,
    "qwen2.5-7b": 7.62, "qwen2.5-32b": 32.8, "qwen-r1-1.5b": 1.78, "qwen-r1-7b": 7.62, "qwen-r1-32b": 32.8,
    "smollm2-135m": 0.1345,
}  # fmt: skip
"""Billions, as the models' cards have them."""


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("context", [1, 8192, 1 << 20])
def test_llama_is_as_the_paper_has_it(batch, context):
    assert flops(LLAMA, batch=batch, context=context) == pytest.approx(
        1.50e10 * batch + 5.24e5 * batch * context, rel=2e-3
    )
    assert bytes_read(LLAMA, batch=batch, context=context) == pytest.approx(
        1.50e10 + 1.31e5 * batch * context, rel=2e-3
    )


def test_the_coefficients_to_the_last_unit():
    """n(6 d d_ff + 4 d^2 + 4 d d_kv) + 2 d V, 4 d n and 4 n d_kv, written out."""
    fixed = 32 * (6 * 4096 * 14336 + 4 * 4096**2 + 4 * 4096 * 1024) + 2 * 4096 * 128256
    assert flops(LLAMA, batch=3, context=7) == 3 * fixed + 4 * 4096 * 32 * 3 * 7
    assert bytes_read(LLAMA, batch=3, context=7) == fixed + 4 * 32 * 1024 * 3 * 7
    assert f"{fixed:.2e} {4 * 4096 * 32:.2e} {4 * 32 * 1024:.2e}" == "1.50e+10 5.24e+05 1.31e+05"


def test_keys_and_values_of_the_paper():
    assert kv_bytes(LLAMA, batch=256, context=8192) == 256 * 2**30
    assert kv_bytes(replace(LLAMA, layers=64), batch=256, context=8192) == 512 * 2**30


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_published_numbers_of_parameters(name):
    """A size typed wrongly shows here."""
    assert weight_bytes(SHAPES[name], held=True) / 2e9 == pytest.approx(PARAMETERS[name], rel=3e-3)


@pytest.mark.parametrize("cost", [flops, bytes_read])
def test_a_ratio_divides_what_grows_with_the_context_and_nothing_else(cost):
    empty = cost(LLAMA, batch=5, context=0)
    grown = cost(LLAMA, batch=5, context=4096) - empty
    assert cost(LLAMA, batch=5, context=4096, ratio=8) == empty + grown / 8
    assert cost(LLAMA, batch=5, context=4096 * 8, ratio=8) == empty + grown


def test_a_sliding_window_bounds_its_layers_whatever_the_ratio():
    mixed = replace(LLAMA, window_layers=24, window=1024)
    a_token = 4 * mixed.d_kv
    assert kv_bytes(mixed, batch=1, context=512) == 32 * 512 * a_token
    assert kv_bytes(mixed, batch=1, context=8192, ratio=4) == (8 * 8192 / 4 + 24 * 1024) * a_token


def test_a_step_waits_for_bytes_when_alone_and_for_flops_in_a_large_batch():
    gpu = HARDWARE["h100-sxm"]
    compute, bandwidth = step_seconds(LLAMA, gpu, batch=1, context=1)
    assert bandwidth == pytest.approx(1.50e10 / 3.35e12, rel=2e-3) and compute < bandwidth
    compute, bandwidth = step_seconds(LLAMA, gpu, batch=4096, context=1)
    assert compute == pytest.approx(4096 * 1.50e10 / 989.5e12, rel=2e-3) and compute > bandwidth
