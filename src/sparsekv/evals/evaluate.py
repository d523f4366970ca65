"""evaluate: what a ratio costs a model, each score beside the ratio that was measured while it was taken.

Held-out text of the training's domain, texts of other domains and longer rows (perplexity.py), and retrieval
(retrieval.py), everything through the attached policy (forward.py says how).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.evals import retrieval
from sparsekv.evals.calibrate import calibrate
from sparsekv.evals.corpus import Corpus, hay_of
from sparsekv.evals.forward import Reading, read
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.perplexity import TextRows, TextScore
from sparsekv.evals.settings import EvaluationConfig
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.split import SplitModel
from sparsekv.policies.dms import DMSPolicy


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the dial: the ratio asked for and the offset on the logits (None leaves the policy as it is)."""

    asked: float | None = None
    offset: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score(TextScore):
    """What one point costs: on the held-out text, and"""

    asked: float | None
    others: dict[str, TextScore]
    """By other text, and by length ("4096 tokens") of the held-out one."""
    retrieval: dict[str, dict]
    """By kind; see retrieval.summarise."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return _finite(asdict(self))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    documents: Sequence[str],
    points: Sequence[Point],
    settings: EvaluationConfig,
    others: Mapping[str, Sequence[str]] | None = None,
    reference: PreTrainedModel | None = None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Measure an attached model at each point, in order, until the seconds are spent; at least one point is measured.

    documents: plain text that no training has seen. others: by name, texts of other domains (corpus.other_documents).
    reference: what counts as dense where all weights of the model were trained; None is the model as it was before
    attach, without an adapter's LoRA. on_score: called after each point.

    Raises ValueError for a model that is not attached, an offset for a policy that has none, or documents shorter than
    the lengths asked for.
    """
    deadline = time.monotonic() + settings.seconds
    bench = _Bench(model, tokenizer, documents, others or {}, settings, reference=reference)
    scores: list[Score] = []
    for point in points:
        if scores and time.monotonic() > deadline:
            break
        scores.append(bench.score(point))
        on_score(scores[-1])
    return scores


def describe(score: Score) -> str:
    """One line about a score."""

    def cost(text: TextScore) -> str:
        return f"{text.perplexity / text.perplexity_dense - 1:+.2%}"

    line = f"ratio {score.ratio:.2f}  perplexity {score.perplexity:.3f} ({cost(score)})"
    line += f"  divergence {score.divergence:.4f}"
    for name, text in score.others.items():
        line += f"  {name} {cost(text)} at {text.ratio:.2f}"
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
        others: Mapping[str, Sequence[str]],
        settings: EvaluationConfig,
        *,
        reference: PreTrainedModel | None,
    ) -> None:
        self.policy = attachment_of(model).policy
        self.settings = settings
        self.seen, self.held = 0, 0.0
        """What was read of late, to know the ratio."""
        with contexts.dense(model):
            self.split = SplitModel(model)
        self.reference = self.split if reference is None else SplitModel(reference)
        corpus = Corpus(documents, tokenizer)
        builder = ItemBuilder(hay_of(documents, tokenizer, max(settings.contexts, default=1)), tokenizer)
        self.cells = retrieval.retrieval_cells(
            builder, kinds=settings.kinds, contexts=settings.contexts, items=settings.items, seed=settings.seed
        )
        with contexts.original(model):
            self.held_out = self._rows(corpus, settings.length)
            self.others = {name: self._rows(Corpus(t, tokenizer), settings.length) for name, t in others.items()}
            self.longer = {f"{length} tokens": self._rows(corpus, length) for length in settings.long_lengths}
            self.dense_right = [
                retrieval.forced(self.reference, cell, self._dense, batch=settings.batch) for cell in self.cells
            ]

    def score(self, point: Point) -> Score:
        """Measure one point; the policy's dial is put back afterwards."""
        started = time.monotonic()
        offset = self._offset(self.held_out, point)
        others = {name: self._text(rows, self._offset(rows, point)) for name, rows in self.others.items()}
        others |= {name: self._text(rows, offset) for name, rows in self.longer.items()}
        answers, ratios = [], []
        for cell in self.cells:
            self.seen, self.held = 0, 0.0
            with self._dialled(self._cell_offset(cell, point)):
                answers.append(self._answers(cell))
            ratios.append(self.seen / self.held if self.held else None)
        return Score(
            **asdict(self._text(self.held_out, offset)),
            asked=point.asked,
            others=others,
            retrieval=retrieval.summarise(self.cells, answers, self.dense_right, ratios=ratios),
            seconds=round(time.monotonic() - started, 2),
        )

    def _rows(self, corpus: Corpus, length: int) -> TextRows:
        length = corpus.fitting(self.settings.rows, length)
        count = max(1, self.settings.rows * self.settings.length // length)
        rows = corpus.rows(min(count, self.settings.rows), length).to(next(self.split.model.parameters()).device)
        return TextRows(self.split, rows, reference=self.reference, batch=self.settings.batch)

    def _offset(self, text: TextRows, point: Point) -> float | None:
        return self._offset_on(text.rows, point)

    def _offset_on(self, rows: Tensor, point: Point) -> float | None:
        """The point's, or one at which these rows have the ratio asked for."""
        dialled = self.settings.same_ratio and point.asked is not None and point.asked > 1
        if not dialled or not isinstance(self.policy, DMSPolicy):
            return point.offset
        batch, eviction = self.settings.batch, self.settings.eviction
        model = self.split.model
        return calibrate(model, rows, targets=[point.asked or 1], batch=batch, eviction=eviction)[0].offset

    def _cell_offset(self, cell: retrieval.Cell, point: Point) -> float | None:
        """As _offset, on the first items of a cell; the point's where the window forbids the ratio there."""
        if not cell.items:
            return point.offset
        rows = torch.from_numpy(np.stack([item.ids for item in cell.items[: self.settings.batch]]).astype(np.int64))
        reach = (point.asked or 1) * self.policy.window(0)
        return point.offset if cell.context <= reach else self._offset_on(rows, point)

    def _text(self, text: TextRows, offset: float | None) -> TextScore:
        with self._dialled(offset):
            return text.score(self._read, offset=offset)

    def _answers(self, cell: retrieval.Cell) -> list[bool]:
        if self.settings.answers == "generated":
            return retrieval.generated(self.split, cell, batch=self.settings.batch)
        return retrieval.forced(self.split, cell, self._read, batch=self.settings.batch)

    def _read(self, ids: Tensor) -> Reading:
        reading = read(self.split, ids, eviction=self.settings.eviction)
        self.seen, self.held = self.seen + reading.seen, self.held + reading.held
        return reading

    def _dense(self, ids: Tensor) -> Reading:
        with torch.no_grad():
            return Reading(hidden=self.reference.hidden(ids), seen=ids.numel(), held=float(ids.numel()))

    @contextmanager
    def _dialled(self, offset: float | None) -> Iterator[None]:
        """Within, the policy's dial stands at `offset`."""
        if offset is None:
            yield
            return
        if not isinstance(self.policy, DMSPolicy):
            raise ValueError(f"policy {self.policy.name!r} has no offset to dial; leave out the ratios")
        with contexts.dialled(self.policy, offset):
            yield


def _finite(value: Any) -> Any:
    """Minus infinity, an offset that marks nothing, as null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
