"""Chains of thought of one problem: W in parallel from one prefill, each of at most L tokens.

A chain is drawn once at the largest L and serves every smaller one: what it had read and held after l tokens, and its
answer only where it had ended by then. That is what a draw with max_tokens=l would give, token for token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsekv.engine.kv import KVHistory, RequestKV
from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import CompletionOutput
from sparsekv.engine.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One sample, finished."""

    text: str
    """Without special tokens."""
    tokens: int
    """Those it was given, the one that ended it included."""
    ended: bool
    """By itself; else it was cut off and has no answer."""
    history: KVHistory

    def ended_by(self, length: int) -> bool:
        """Whether it had ended by itself after `length` tokens."""
        return self.ended and self.tokens <= length

    def at(self, length: int) -> RequestKV:
        """What it had held and read after `length` tokens, or at its end."""
        return self.history.at(min(length, self.tokens))


def draw_chains(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]
) -> list[list[Chain]]:
    """params.n chains of each prompt (token ids), each prompt with its own seed; all of them run together.

    Raises ValueError where a prompt and its chains can never fit.
    """
    each = [replace(params, seed=seed, detokenize=False) for seed in seeds]
    outputs = llm.generate(list(prompts), each, use_tqdm=False)
    return [[_chain(sample, llm) for sample in output.outputs] for output in outputs]


def _chain(sample: CompletionOutput, llm: LLM) -> Chain:
    assert sample.kv_history is not None
    return Chain(
        text=llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True),
        tokens=len(sample.token_ids),
        ended=sample.finish_reason == "stop",
        history=sample.kv_history,
    )
