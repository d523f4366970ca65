"""Sequential scaling: a chain thinks for so many tokens at most, then its end marker is forced, and there is room for
the answer. The marker is what the model writes between thought and answer: from the tokenizer, or given as text.

params = with_budget(SamplingParams(n=8, temperature=0.6), tokenizer, thinking=1024, answer=256)
"""

from dataclasses import replace
from typing import Any

from sparsekv.engine.params import SamplingParams
from sparsekv.engine.thinking import ThinkingBudget

MARKERS = ("</think>", "</thinking>", "</reasoning>", "[/THINK]")
"""End markers that a tokenizer may know as one token: Qwen3 and DeepSeek-R1, others, Magistral."""


def with_budget(
    params: SamplingParams, tokenizer: Any, *, thinking: int, answer: int, marker: str | None = None
) -> SamplingParams:
    """The same sampling with a thinking budget of `thinking` tokens and max_tokens for `answer` more after the marker.

    Raises ValueError for a tokenizer that knows no end marker where none is given, and for numbers out of range.
    """
    if answer < 1:
        raise ValueError(f"{answer} tokens are left for the answer; leave room for at least one")
    end = end_marker(tokenizer, marker)
    budget = ThinkingBudget(tokens=thinking, end=end)
    return replace(params, thinking=budget, max_tokens=thinking + len(end) + answer)


def end_marker(tokenizer: Any, marker: str | None = None) -> tuple[int, ...]:
    """Token ids of the marker given, or of the first of MARKERS that is a token of the vocabulary.

    Raises ValueError where there is none.
    """
    if marker:
        return tuple(tokenizer.encode(marker, add_special_tokens=False))
    vocabulary = tokenizer.get_vocab()
    for known in MARKERS:
        if known in vocabulary:
            return (vocabulary[known],)
    raise ValueError(
        f"this tokenizer has none of the end markers {', '.join(MARKERS)}; give the text that this model writes "
        "between thought and answer"
    )
