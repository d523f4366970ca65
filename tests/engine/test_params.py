"""SamplingParams: one clear sentence for each mistake."""

import pytest

from sparsekv import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n", 0, "n is 0; use at least 1"),
        ("n", True, "use an integer"),
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", float("nan"), "use a number"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.1, "from 0 to 1"),
        ("top_k", -2, "top_k is -2"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "where 1 is off"),
        ("presence_penalty", 3, "from -2 to 2"),
        ("frequency_penalty", "1", "use a number"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("min_tokens", 17, "more than max_tokens"),
        ("logprobs", -1, "logprobs is -1"),
        ("seed", 0.5, "use an integer"),
        ("stop", [""], "non-empty"),
        ("stop_token_ids", [-1], "stop_token_ids is -1"),
        ("logit_bias", {-1: 0.5}, "logit_bias is -1"),
        ("logit_bias", {3: "x"}, r"logit_bias\[3\] is 'x'"),
    ],
)
def test_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(beams=3)  # type: ignore[call-arg]


def test_stop_may_be_one_text_or_several() -> None:
    assert SamplingParams(stop="a").stops == ("a",)
    assert SamplingParams(stop=["a", "b"]).stops == ("a", "b")
    assert SamplingParams().stops == ()


def test_stop_strings_need_the_text() -> None:
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_what_is_nearly_zero_is_greedy() -> None:
    """vLLM's threshold."""
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
