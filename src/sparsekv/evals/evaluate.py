"""evaluate: what a ratio costs a model, each score beside the ratio that was measured while it was taken.

Perplexity over the model's own dense perplexity, KL(dense || sparse) in nats per token, how often the most likely token
is the same, and retrieval; everything teacher-forced through the attached policy (forward.py says how).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv import dms
from sparsekv.evals import retrieval
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.forward import Reading, read
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.settings import EvaluationConfig
from sparsekv.modeling import modes
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.states import SplitModel
from sparsekv.policies.dms import DMSPolicy


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the dial: the ratio asked for and the offset on the logits (None leaves the policy as it is)."""

    asked: float | None = None
    offset: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one point costs."""

    asked: float | None
    offset: float | None
    """-inf is written as null in JSON."""
    ratio: float
    """Tokens seen / tokens held at the end of the texts, the window counted."""
    perplexity: float
    perplexity_dense: float
    divergence: float
    """KL(dense || sparse), nats per token."""
    agreement: float
    """The share of positions whose most likely token is dense's."""
    retrieval: dict[str, dict]
    """By kind; see retrieval.summarise."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(self)
        if self.offset is not None and math.isinf(self.offset):
            values["offset"] = None
        return values


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    documents: Sequence[str],
    points: Sequence[Point],
    settings: EvaluationConfig,
    through: str = "cache",
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Measure an attached model at each point, in order, until the seconds are spent; at least one point is measured.

    documents: plain text that no training has seen. through: "cache" or "mask". on_score: called after each point.

    Raises ValueError for a model that is not attached, an offset for a policy that has none, or documents shorter than
    the lengths asked for.
    """
    deadline = time.monotonic() + settings.seconds
    bench = _Bench(model, tokenizer, documents, settings=settings, through=through)
    scores: list[Score] = []
    for point in points:
        if scores and time.monotonic() > deadline:
            break
        scores.append(bench.score(point))
        on_score(scores[-1])
    return scores


def describe(score: Score) -> str:
    """One line about a score."""
    line = f"ratio {score.ratio:.2f}  perplexity {score.perplexity:.3f} "
    line += f"({score.perplexity / score.perplexity_dense - 1:+.2%})  divergence {score.divergence:.4f}"
    for kind, cell in score.retrieval.items():
        pairs = zip(cell["accuracy"].values(), cell["dense"].values(), strict=True)
        line += f"  {kind} " + "/".join(f"{ours:.2f} of {dense:.2f}" for ours, dense in pairs)
    return f"{line}  [{score.seconds:.0f} s]"


class _Bench:
    """The texts and items, and what the dense model makes of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[str],
        *,
        settings: EvaluationConfig,
        through: str,
    ) -> None:
        self.policy = attachment_of(model).policy
        self.settings, self.through = settings, through
        with modes.dense(model):
            self.split = SplitModel(model)
        corpus = Corpus(documents, tokenizer)
        rows = corpus.rows(settings.rows, settings.length).to(next(model.parameters()).device)
        builder = ItemBuilder(corpus, tokenizer)
        self.batches = rows.split(settings.batch)
        self.cells = retrieval.retrieval_cells(
            builder, contexts=settings.contexts, items=settings.items, seed=settings.seed
        )
        with modes.dense(model):
            self.dense_hidden = [self._dense(ids).hidden for ids in self.batches]
            self.dense_right = [self._right(cell, self._dense) for cell in self.cells]

    def score(self, point: Point) -> Score:
        """Measure one point; the policy's dial is put back afterwards."""
        started = time.monotonic()
        previous = None
        if point.offset is not None:
            if not isinstance(self.policy, DMSPolicy):
                raise ValueError(f"policy {self.policy.name!r} has no offset to dial; leave out the ratios")
            previous, self.policy.offset = self.policy.offset, point.offset
        try:
            sums, seen, held = self._texts()
            answers = [self._right(cell, self._read) for cell in self.cells]
        finally:
            if previous is not None:
                assert isinstance(self.policy, DMSPolicy)
                self.policy.offset = previous
        positions = seen - len(torch.cat(self.batches))
        return Score(
            asked=point.asked,
            offset=point.offset,
            ratio=seen / held,
            perplexity=math.exp(sums[0] / positions),
            perplexity_dense=math.exp(sums[1] / positions),
            divergence=sums[2] / positions,
            agreement=sums[3] / positions,
            retrieval=retrieval.summarise(self.cells, answers, self.dense_right),
            seconds=round(time.monotonic() - started, 2),
        )

    def _texts(self) -> tuple[list[float], int, float]:
        """(sums over predicted positions of nll, dense nll, divergence and agreement; tokens seen; tokens held)."""
        sums = torch.zeros(4, dtype=torch.float64)
        seen, held = 0, 0.0
        for ids, dense_hidden in zip(self.batches, self.dense_hidden, strict=True):
            reading = self._read(ids)
            seen, held = seen + reading.seen, held + reading.held
            parts = (x[:, :-1].flatten(0, 1) for x in (reading.hidden, dense_hidden))
            for sparse, dense, following in self.split.chunks(*parts, ids[:, 1:].flatten()):
                sums += self._compare(sparse, dense, following)
        return sums.tolist(), seen, held

    @torch.no_grad()
    def _compare(self, sparse: Tensor, dense: Tensor, following: Tensor) -> Tensor:
        ours, theirs = self.split.logits(sparse).float(), self.split.logits(dense).float()
        cross_entropy = torch.nn.functional.cross_entropy
        sums = (
            cross_entropy(ours, following, reduction="sum"),
            cross_entropy(theirs, following, reduction="sum"),
            dms.kl_teacher_student(theirs, ours).sum(),
            (ours.argmax(-1) == theirs.argmax(-1)).sum(),
        )
        return torch.stack([x.double() for x in sums]).cpu()

    def _read(self, ids: Tensor) -> Reading:
        return read(self.split, ids, through=self.through)

    def _dense(self, ids: Tensor) -> Reading:
        with torch.no_grad():
            return Reading(hidden=self.split.hidden(ids), seen=ids.numel(), held=float(ids.numel()))

    def _right(self, cell: retrieval.Cell, reader: Callable[[Tensor], Reading]) -> list[bool]:
        return retrieval.right(self.split, cell, reader, batch=self.settings.batch)
