"""The answer of n samples: by majority, with an early stop, or by a scorer. The rules are scaling's."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsekv.engine.outputs import RequestOutput
from sparsekv.engine.schedule.request import StopWhen
from sparsekv.scaling.answers import EXTRACTORS
from sparsekv.scaling.early import Decided, answer_of
from sparsekv.scaling.scorer import Scorer, ScorerError, best
from sparsekv.scaling.vote import vote
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.openai.requests import VoteOptions


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """One request's vote. scorer: set where it ranks. Raises ApiError where there is nothing to vote on."""

    options: VoteOptions
    samples: int
    scorer: Scorer | None

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ApiError(400, "a vote needs samples; set n to 2 or more", param="vote")
        if self.options.by == "scorer" and self.scorer is None:
            raise ApiError(400, "this server has no scorer; use vote.by = majority", param="vote")

    @property
    def extract(self) -> Callable[[str], str | None]:
        return EXTRACTORS[self.options.answer]

    @property
    def stop_when(self) -> StopWhen | None:
        """A scorer ranks all samples, so none is ended early for it."""
        if self.options.by == "scorer" or not self.options.early_stop:
            return None
        return Decided(chains=self.samples, extract=self.extract)

    async def count(self, output: RequestOutput, *, problem: str) -> dict[str, Any]:
        """The finished samples' vote, as the reply tells it. problem: what a scorer is shown.

        Raises ApiError where the scorer fails.
        """
        answers = [answer_of(sample, self.extract) for sample in output.outputs]
        counted = vote(answers)
        told: dict[str, Any] = {
            "by": self.options.by,
            "answer": counted.answer,
            "index": None if counted.answer is None else answers.index(counted.answer),
            "tied": list(counted.tied) if len(counted.tied) > 1 else [],
            "weights": counted.weights,
            "voters": counted.voters,
            "stopped_early": sum(sample.stop_reason == "stop_when" for sample in output.outputs),
        }
        if self.scorer is None or self.options.by == "majority":
            return told
        chains = [(problem, sample.text) for sample in output.outputs]
        try:
            scores = await asyncio.to_thread(self.scorer.scores, chains)
        except ScorerError as error:
            raise ApiError(502, str(error), code="scorer_failed") from None
        index = best(answers, scores)
        winner = None if index is None else answers[index]
        return told | {"answer": winner, "index": index, "tied": [], "scores": scores}


def outcome(told: dict[str, Any]) -> str:
    """One word for the metrics."""
    return "none" if told["answer"] is None else "tie" if told["tied"] else "clear"
