"""Early stop: once a vote is decided, the chains that still run cannot change it, and their pages are given back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsekv.engine.outputs import CompletionOutput
from sparsekv.scaling.vote import decided


@dataclass(frozen=True, kw_only=True)
class Decided:
    """`stop_when` of LLM.generate and LLM.stream, for SamplingParams(n=chains): the vote's winner is what all chains
    would have elected. The losers end with reason "abort".

    extract: the answer in a chain's text, or None; it must not raise.
    """

    chains: int
    extract: Callable[[str], str | None]

    def __call__(self, finished: Sequence[CompletionOutput]) -> bool:
        return decided([answer_of(output, self.extract) for output in finished], chains=self.chains)


def answer_of(output: CompletionOutput, extract: Callable[[str], str | None]) -> str | None:
    """A chain's answer; None where it was cut off."""
    return extract(output.text) if output.finish_reason == "stop" else None
