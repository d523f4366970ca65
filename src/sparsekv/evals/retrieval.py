"""Retrieval, teacher-forced: an item is right iff every token of its answer is the most likely one.

pass key   the best known template, which training also uses (in text that it does not)
unseen     templates and words that training never uses
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsekv.evals.forward import Reading
from sparsekv.evals.items import Item, ItemBuilder
from sparsekv.evals.templates import PASS_KEY, UNSEEN
from sparsekv.modeling.states import SplitModel

KINDS = ("pass key", "unseen")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The items of one kind and context length."""

    kind: str
    context: int
    items: list[Item]


def retrieval_cells(builder: ItemBuilder, *, contexts: Sequence[int], items: int, seed: int) -> list[Cell]:
    """One fact an item, at random depth; the pass key always in the style "lead", the unseen facts in each in turn."""
    cells = []
    for kind_index, kind in enumerate(KINDS):
        for context in contexts:
            rng = np.random.default_rng((seed, kind_index, context))
            built = [_item(builder, rng, kind, context, i) for i in range(items)]
            cells.append(Cell(kind=kind, context=context, items=built))
    return cells


def _item(builder: ItemBuilder, rng: np.random.Generator, kind: str, context: int, index: int) -> Item:
    if kind == "pass key":
        return builder.build(rng, PASS_KEY.facts(rng, 1), asked=[0], length=context, style="lead")
    facts = UNSEEN[index % len(UNSEEN)].facts(rng, 1, unseen=True)
    style = builder.styles[index // len(UNSEEN) % len(builder.styles)]
    return builder.build(rng, facts, asked=[0], length=context, style=style)


@torch.no_grad()
def right(split: SplitModel, cell: Cell, read: Callable[[Tensor], Reading], *, batch: int) -> list[bool]:
    """Which items of a cell are answered right. read: ids int64 [B, S] -> Reading."""
    device = next(split.model.parameters()).device
    results: list[bool] = []
    for start in range(0, len(cell.items), batch):
        items = cell.items[start : start + batch]
        ids = torch.from_numpy(np.stack([item.ids for item in items]).astype(np.int64)).to(device)
        hidden = read(ids).hidden
        for row, item in enumerate(items):
            spans = [torch.arange(first, last, device=device) for first, last in item.answers]
            at = torch.cat(spans)
            best = split.logits(hidden[row, at - 1]).argmax(-1)
            results.append(bool((best == ids[row, at]).all()))
    return results


def summarise(cells: Sequence[Cell], answers: Sequence[list[bool]], dense: Sequence[list[bool]]) -> dict[str, dict]:
    """By kind: accuracy and dense accuracy at each context; share_of_dense, the ratio of the two over all contexts
    (None where dense gets nothing right); kept, the part of dense's right answers that stays right."""
    summary: dict[str, dict] = defaultdict(lambda: {"accuracy": {}, "dense": {}})
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3, dtype=int))
    for cell, ours, theirs in zip(cells, answers, dense, strict=True):
        if not ours:
            continue
        summary[cell.kind]["accuracy"][str(cell.context)] = round(sum(ours) / len(ours), 4)
        summary[cell.kind]["dense"][str(cell.context)] = round(sum(theirs) / len(theirs), 4)
        both = sum(a and b for a, b in zip(ours, theirs, strict=True))
        counts[cell.kind] += np.array([sum(ours), sum(theirs), both])
    for kind, (ours, theirs, both) in counts.items():
        summary[kind]["share_of_dense"] = round(ours / theirs, 4) if theirs else None
        summary[kind]["kept"] = round(both / theirs, 4) if theirs else None
    return dict(summary)
