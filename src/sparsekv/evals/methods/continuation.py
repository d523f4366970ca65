"""What a setting costs on running text: all but the last tokens of each row are the prompt, the others are scored token
by token, beside what the dense model makes of them. Intervals come of stretches of tokens, which are alike within
themselves.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv import dms
from sparsekv.evals.methods.intervals import Estimate, bootstrap
from sparsekv.evals.methods.rows import Usage
from sparsekv.evals.methods.steps import walk
from sparsekv.modeling.split import SplitModel

STRETCH = 64
"""Tokens that are resampled together."""
UNIT = f"stretches of {STRETCH} tokens"


class Continuation:
    """Rows of a text, int64 [N, S], of which the last `scored` tokens are; `dense` must be measured first, within
    contexts.original."""

    def __init__(self, split: SplitModel, rows: Tensor, *, scored: int, batch: int) -> None:
        self.split, self.rows, self.scored, self.batches = split, rows, scored, rows.split(batch)
        self.start = (
            rows.shape[1] - scored - 1
        )  # the prompt's last token is the first step, and predicts the first scored
        self.baseline: list[Tensor] = []
        """Dense's hidden states, by batch."""

    def dense(self, *, by_steps: bool) -> tuple[Usage, dict[str, Estimate]]:
        """Measure the dense model, and keep its hidden states to compare with."""
        self.baseline = []
        return self._measure(by_steps, keep=True)

    def score(self, *, by_steps: bool) -> tuple[Usage, dict[str, Estimate]]:
        """Measure the model as it is governed now: perplexity, rise (over dense's perplexity, of the same
        tokens), divergence (KL(dense || sparse), nats per token) and agreement (the share of tokens at which the most
        likely one is dense's)."""
        assert self.baseline, "the dense model is measured first"
        return self._measure(by_steps, keep=False)

    def _measure(self, by_steps: bool, *, keep: bool) -> tuple[Usage, dict[str, Estimate]]:
        usage, parts = Usage(counts_reads=by_steps), []
        for i, ids in enumerate(self.batches):
            with usage.timed():
                walked = walk(self.split, ids, start=self.start, by_steps=by_steps)
            count = walked.tokens.numel()
            usage.add(walked.stats, sequences=len(ids), output=count, size=walked.stats.bytes)
            if keep:
                self.baseline.append(walked.hidden)
            pieces = (x.flatten(0, 1) for x in (walked.hidden, self.baseline[i], walked.tokens))
            compared = torch.cat([self._compare(*piece) for piece in self.split.chunks(*pieces)], dim=1)
            parts.append(compared.view(len(compared), len(ids), -1))
        return usage, _scores(torch.cat(parts, dim=1).numpy())

    @torch.no_grad()
    def _compare(self, sparse: Tensor, dense: Tensor, following: Tensor) -> Tensor:
        """float64 [4, n]: nll, nll over dense's, divergence and agreement of each token."""
        ours, theirs = self.split.logits(sparse).float(), self.split.logits(dense).float()
        nll, dense_nll = (torch.nn.functional.cross_entropy(x, following, reduction="none") for x in (ours, theirs))
        values = (
            nll,
            nll - dense_nll,
            dms.kl_teacher_student(theirs, ours),
            ours.argmax(-1) == theirs.argmax(-1),
        )
        return torch.stack([x.double() for x in values]).cpu()


def _scores(values: NDArray[np.float64]) -> dict[str, Estimate]:
    """values: [4, N, T]."""
    cuts = np.arange(0, values.shape[-1], STRETCH)
    sums = np.add.reduceat(values, cuts, axis=-1).reshape(len(values), -1)
    weights = np.add.reduceat(np.ones_like(values[0]), cuts, axis=-1).ravel()
    return {
        "perplexity": bootstrap(sums[0], weights, unit=UNIT, statistic=np.exp),
        "rise": bootstrap(sums[1], weights, unit=UNIT, statistic=np.expm1),
        "divergence": bootstrap(sums[2], weights, unit=UNIT),
        "agreement": bootstrap(sums[3], weights, unit=UNIT),
    }
