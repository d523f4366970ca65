"""Retrieval as generation does it: the text with the question is the prompt, its last token the first decode step, and
the answer is given step by step, forced or generated. An item's score is the share of its answers that are right.

forced      an answer is right iff each of its tokens is the most likely one, those before it given
generated   the most likely tokens are followed; an answer is right iff it occurs in them (RULER's rule)

Prompts of a batch are padded on the left to end together, which changes no score. An item whose answer is over is read
on, to the end of the longest.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv.evals.items import Item
from sparsekv.evals.methods.intervals import Estimate, share
from sparsekv.evals.methods.rows import Usage
from sparsekv.evals.methods.steps import Walk, walk
from sparsekv.evals.retrieval import DEPTHS, Cell
from sparsekv.modeling.split import SplitModel


def answer(
    split: SplitModel, cell: Cell, tokenizer: PreTrainedTokenizerBase, *, answers: str, batch: int
) -> tuple[Usage, list[float]]:
    """(usage, score of each item) of a cell, as the model is governed now."""
    usage, scores = Usage(), [0.0] * len(cell.items)
    device = next(split.model.parameters()).device
    order = sorted(range(len(cell.items)), key=lambda i: answer_tokens(cell.items[i]))
    for i in range(0, len(order), batch):
        part = [cell.items[j] for j in order[i : i + batch]]
        ids, pads, start = _aligned(part)
        with usage.timed():
            walked = walk(split, ids.to(device), start=start, pads=pads.to(device), greedy=answers == "generated")
        usage.add(walked.stats, sequences=len(part), output=walked.tokens.numel(), size=walked.stats.bytes)
        for row, j in enumerate(order[i : i + batch]):
            judge = _judge_generated if answers == "generated" else _judge_forced
            scores[j] = judge(split, walked, row, cell.items[j], tokenizer)
    return usage, scores


def answer_tokens(item: Item) -> int:
    """Tokens from the first answer's first to the last one's last."""
    return item.answers[-1][1] - item.answers[0][0]


def _aligned(items: list[Item]) -> tuple[Tensor, Tensor, int]:
    """(ids int64 [B, S], tokens of padding that each begins with int64 [B], the column of each prompt's last token);
    padding, on the right too, is token 0."""
    firsts = [item.answers[0][0] for item in items]
    width, new = max(firsts), max(answer_tokens(item) for item in items)
    ids = np.zeros((len(items), width + new), dtype=np.int64)
    for row, item, first in zip(ids, items, firsts, strict=True):
        told = item.ids[: first + new]
        row[width - first : width - first + len(told)] = told
    pads = torch.tensor([width - first for first in firsts])
    return torch.from_numpy(ids), pads, width - 1


def summarise(
    cell: Cell, scores: list[float], dense: list[float]
) -> tuple[dict[str, Estimate], dict[str, Estimate | None]]:
    """(accuracy, and kept: its mean over the items that dense answers fully; accuracy by quarter of the text)."""
    found = {
        "accuracy": share(scores),
        "kept": share([ours for ours, best in zip(scores, dense, strict=True) if best == 1]),
    }
    quarters = [min(int(4 * item.depth), 3) for item in cell.items]
    by_depth = {
        name: share([score for score, quarter in zip(scores, quarters, strict=True) if quarter == i])
        for i, name in enumerate(DEPTHS)
    }
    return {name: estimate for name, estimate in found.items() if estimate is not None}, by_depth


def _judge_forced(split: SplitModel, walked: Walk, row: int, item: Item, tokenizer: PreTrainedTokenizerBase) -> float:
    first = item.answers[0][0]
    best = split.logits(walked.hidden[row]).argmax(-1)
    right = [
        bool((best[a - first : b - first] == walked.tokens[row, a - first : b - first]).all()) for a, b in item.answers
    ]
    return sum(right) / len(right)


def _judge_generated(
    split: SplitModel, walked: Walk, row: int, item: Item, tokenizer: PreTrainedTokenizerBase
) -> float:
    text = str(tokenizer.decode(walked.tokens[row, : answer_tokens(item)])).lower()
    right = [str(tokenizer.decode(item.ids[a:b])).strip().lower() in text for a, b in item.answers]
    return sum(right) / len(right)
