"""measure: running text and retrieval under several settings and dense, in one run and through the real cache.

Each text, and each kind and length of retrieval, is a part: a setting's budget is made for its length, the dense model
is measured on it first, and both give one row. A Bench keeps the parts and what dense made of them, for settings that
come later.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.evals import retrieval
from sparsekv.evals.calibrate import calibrate
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.items import ItemBuilder
from sparsekv.evals.methods import questions
from sparsekv.evals.methods.continuation import Continuation
from sparsekv.evals.methods.rows import Row, Usage, make_row
from sparsekv.evals.methods.setting import Setting, budget_of
from sparsekv.evals.methods.steps import needs_steps
from sparsekv.evals.settings import MeasurementConfig
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.split import SplitModel
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy

DENSE = Setting()
HELD_OUT = "held out"
Baseline = list[Tensor] | list[float]
"""What is kept of dense: the hidden states of running text, by batch, or the score of each item."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    *,
    documents: Sequence[str],
    config: MeasurementConfig,
    others: Mapping[str, Sequence[str]] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """One row for each part, dense first and then for each setting in order, until the seconds are spent.

    model: attached by Setting.attach of these settings, which share an adapter or have none. documents: plain text that
    no training has seen; others: texts of other domains by name.

    Raises ValueError, before anything is measured, for a setting that cannot be had at one of the lengths, a length
    that the text or the model's context has not, or a way of scoring that would leave a method nothing to do.
    """
    deadline = time.monotonic() + config.seconds
    bench = Bench(model, tokenizer, documents=documents, others=others or {}, config=config)
    by_steps = bench.check(settings)
    rows: list[Row] = []
    for setting in (DENSE, *settings):
        if len(rows) > len(bench.parts) and time.monotonic() > deadline:
            break
        for row in bench.rows(setting, by_steps=by_steps):
            rows.append(row)
            on_row(row)
    return rows


@dataclass(kw_only=True, eq=False)
class _Part:
    """What is measured at one length."""

    task: str
    length: int
    text: str | None = None
    continuation: Continuation | None = None
    cell: retrieval.Cell | None = None
    dense: list[float] = field(default_factory=list)
    """Each item's score by the dense model."""

    @property
    def baseline(self) -> Baseline:
        return self.dense if self.continuation is None else self.continuation.baseline

    @baseline.setter
    def baseline(self, found: Baseline) -> None:
        if self.continuation is None:
            self.dense = [float(score) for score in found]
        else:
            self.continuation.baseline = [hidden for hidden in found if isinstance(hidden, Tensor)]

    @property
    def output(self) -> int:
        """Tokens of the length that come after the prompt, at most."""
        if self.continuation is not None:
            return self.continuation.scored
        assert self.cell is not None
        return max(self.length - item.answers[0][0] for item in self.cell.items)

    @property
    def ids(self) -> Tensor:
        """int64 [N, S]: all that is read."""
        if self.continuation is not None:
            return self.continuation.rows
        assert self.cell is not None
        return torch.from_numpy(np.stack([item.ids for item in self.cell.items]).astype(np.int64))


class Bench:
    """What is measured, by `measure`'s arguments; `rows` of DENSE come before those of any setting, and each setting's
    while the model is attached by it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        documents: Sequence[str],
        others: Mapping[str, Sequence[str]],
        config: MeasurementConfig,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        with contexts.dense(model):
            self.split = SplitModel(model)
        corpus = Corpus(documents, tokenizer)
        self.parts: list[_Part] = []
        self._offsets: dict[str, float] = {}
        """By adapter, options, ratio and part: what a query reads of what is held changes none."""
        if config.text:
            texts = {HELD_OUT: corpus} | {name: Corpus(text, tokenizer) for name, text in others.items()}
            self.parts += [self._text(name, text, config.length) for name, text in texts.items()]
            self.parts += [self._text(HELD_OUT, corpus, length) for length in config.long_lengths]
        cells = retrieval.retrieval_cells(
            ItemBuilder(corpus, tokenizer),
            kinds=config.kinds,
            contexts=config.contexts,
            items=config.items,
            seed=config.seed,
        )
        self.parts += [_Part(task=cell.kind, length=cell.context, cell=cell) for cell in cells]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def baseline(self) -> list[Baseline]:
        """What settings are compared with, by part: made by `rows` of DENSE, or taken from a bench like this one."""
        return [part.baseline for part in self.parts]

    @baseline.setter
    def baseline(self, found: list[Baseline]) -> None:
        for part, dense in zip(self.parts, found, strict=True):
            part.baseline = dense

    def check(self, settings: Sequence[Setting]) -> bool:
        """Whether running text is scored by steps. Raises ValueError as `measure` says."""
        context = attachment_of(self.model).max_tokens
        forced = []
        for part in self.parts:
            if part.length > context:
                raise ValueError(f"{part.length} tokens exceed the model's context of {context}; measure shorter texts")
            for setting in settings:
                with self._governing(setting, part) as policy:
                    forced += [setting.policy] if needs_steps(policy) else []
        if forced and self.config.by == "prefill":
            raise ValueError(f"policy {forced[0]!r} does nothing within a prefill; use --by steps")
        return bool(forced) or self.config.by == "steps"

    def rows(self, setting: Setting, *, by_steps: bool = True, text_only: bool = False) -> Iterator[Row]:
        """Of each part, or of running text alone."""
        for part in self.parts:
            if part.continuation is None and text_only:
                continue
            with self._governing(setting, part) as policy, self._dialled(part, setting, policy):
                usage, scored = self._measure(part, dense=setting == DENSE, by_steps=by_steps)
                budget = budget_of(policy)
            about: dict[str, Any] = {"task": part.task, "length": part.length, "text": part.text}
            yield make_row(setting, usage, budget=budget, seed=self.config.seed, **about, **scored)

    def _governing(self, setting: Setting, part: _Part) -> AbstractContextManager[Policy]:
        output = part.output if self.config.equal_peak else 0
        return setting.governing(self.model, tokens=part.length, output=output)

    def _measure(self, part: _Part, *, dense: bool, by_steps: bool) -> tuple[Usage, dict[str, Any]]:
        """(usage, Row's scores and by_depth) as the model is governed now."""
        if part.continuation is not None:
            score = part.continuation.dense if dense else part.continuation.score
            usage, scores = score(by_steps=by_steps)
            return usage, {"scores": scores}
        assert part.cell is not None
        config = self.config
        usage, right = questions.answer(
            self.split, part.cell, self.tokenizer, answers=config.answers, batch=config.batch
        )
        part.dense = right if dense else part.dense
        scores, by_depth = questions.summarise(part.cell, right, part.dense)
        return usage, {"scores": scores, "by_depth": by_depth}

    def _dialled(self, part: _Part, setting: Setting, policy: Policy) -> AbstractContextManager[None]:
        """Where each text is to have the ratio asked for, the offset at which it has."""
        ratio = setting.cr
        if not self.config.same_ratio or ratio is None or not isinstance(policy, DMSPolicy):
            return nullcontext()
        key = f"{setting.adapter} {setting.options} at {ratio} on {self.parts.index(part)}"
        if key not in self._offsets:
            (dial,) = calibrate(self.model, part.ids, targets=[ratio], batch=self.config.batch)
            self._offsets[key] = dial.offset
        return contexts.dialled(policy, self._offsets[key])

    def _text(self, name: str, corpus: Corpus, length: int) -> _Part:
        config = self.config
        count = max(1, config.rows * config.length // length)
        rows = corpus.rows(min(count, config.rows), length).to(self.device)
        scored = length - length // 2 if config.scored is None else config.scored
        return _Part(
            task="perplexity",
            length=length,
            text=name,
            continuation=Continuation(self.split, rows, scored=scored, batch=config.batch),
        )
