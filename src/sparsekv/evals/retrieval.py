"""Retrieval: an item is right iff every token of its answer is the most likely one, teacher-forced in one forward or
generated token by token through the real cache.

pass key   the best known template, which training also uses (in text that it does not)
unseen     templates and words that training never uses
look-up    eight entries of one such template with a key, one of them asked for
new relations, new forms, rivals, two hops    by the grammar (grammar/), in wordings and words that training never uses,
           the first token of made-up answers given:
           relations that it never uses; blocks in forms that it never uses; one of sixteen with the same such relation;
           a fact about what another fact names, such relations both
multi-needle, variable tracking    RULER's, see ruler.py: several answers to one question
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from sparsekv.evals.forward import Reading
from sparsekv.evals.grammar.puzzles import RIVALS, SENTENCE, WAYS, Part, forms_of, puzzle
from sparsekv.evals.items import Fact, Item, ItemBuilder
from sparsekv.evals.methods.intervals import wilson
from sparsekv.evals.ruler import multi_needle, variable_tracking
from sparsekv.evals.templates import LOOK_UP, PASS_KEY, UNSEEN
from sparsekv.modeling.cache import SparseCache
from sparsekv.modeling.split import SplitModel

GRAMMAR = ("new relations", "new forms", "rivals", "two hops")
KINDS = ("pass key", "unseen", "look-up", "multi-needle", "variable tracking", *GRAMMAR)
ENTRIES = 8
"""Of a look-up."""
TOKENS_PER_ENTRY = 64
"""Short contexts get fewer."""
DEPTHS = ("first quarter", "second quarter", "third quarter", "last quarter")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The items of one kind and context length."""

    kind: str
    context: int
    items: list[Item]


def retrieval_cells(
    builder: ItemBuilder, *, kinds: Sequence[str], contexts: Sequence[int], items: int, seed: int
) -> list[Cell]:
    """At random depth, one question an item; the pass key always in the style "lead", the others in each in turn.

    Raises ValueError for an unknown kind.
    """
    cells = []
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds has {kind!r}; retrieval is one of {', '.join(KINDS)}")
        for context in contexts:
            rng = np.random.default_rng((seed, KINDS.index(kind), context))
            built = [_item(builder, rng, kind, context, i) for i in range(items)]
            cells.append(Cell(kind=kind, context=context, items=built))
    return cells


def _item(builder: ItemBuilder, rng: np.random.Generator, kind: str, context: int, index: int) -> Item:
    if kind == "pass key":
        return builder.build(rng, PASS_KEY.facts(rng, 1), asked=[0], length=context, style="lead")
    style = builder.styles[index % len(builder.styles)]
    if kind in GRAMMAR:
        return builder.build(rng, _puzzle(rng, kind, context, index), asked=[0], length=context, style=style)
    if kind == "multi-needle":
        return builder.build(rng, multi_needle(rng), asked=[0], length=context, style=style)
    if kind == "variable tracking":
        return builder.build(rng, variable_tracking(rng), asked=[0], length=context, style=style, ordered=True)
    templates, count = (LOOK_UP, min(ENTRIES, context // TOKENS_PER_ENTRY)) if kind == "look-up" else (UNSEEN, 1)
    facts = templates[index % len(templates)].facts(rng, count, unseen=True)
    style = builder.styles[index // len(templates) % len(builder.styles)]
    return builder.build(rng, facts, asked=[0], length=context, style=style)


def _puzzle(rng: np.random.Generator, kind: str, context: int, index: int) -> list[Fact]:
    """Its forms in turn; short contexts get fewer rivals."""
    part = Part(relations=kind != "new forms", wordings=True, forms=kind == "new forms")
    forms = forms_of(part) if kind == "new forms" else [SENTENCE, *forms_of(part)]
    form = SENTENCE if kind == "new relations" else forms[index % len(forms)]
    way = kind if kind in WAYS else "direct"
    return puzzle(rng, way, form, part=part, rivals=max(2, min(RIVALS, context // TOKENS_PER_ENTRY)))


@torch.no_grad()
def forced(split: SplitModel, cell: Cell, read: Callable[[Tensor], Reading], *, batch: int) -> list[bool]:
    """Which items of a cell are answered right, teacher-forced. read: ids int64 [B, S] -> Reading."""
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


@torch.no_grad()
def generated(split: SplitModel, cell: Cell, *, batch: int) -> list[bool]:
    """Which items of a cell are answered right by greedy decoding through a SparseCache after the text before the
    answer."""
    results: list[bool] = []
    for start in range(0, len(cell.items), batch):
        items = cell.items[start : start + batch]
        spans = [item.answers[0] for item in items]
        prompts = [
            torch.from_numpy(item.ids[:first].astype(np.int64)) for item, (first, _) in zip(items, spans, strict=True)
        ]
        new = _continue(split, prompts, tokens=max(last - first for first, last in spans))
        for item, (first, last), answer in zip(items, spans, new.tolist(), strict=True):
            results.append(answer[: last - first] == item.ids[first:last].tolist())
    return results


def _continue(split: SplitModel, prompts: list[Tensor], *, tokens: int) -> Tensor:
    """Greedy continuations of prompts of different lengths, padded on the left: int64 [prompts, tokens]."""
    model: Any = split.model
    device = next(split.model.parameters()).device
    ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left").to(device)
    out: Tensor = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=SparseCache(split.model),
        generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0),
    )
    return torch.nn.functional.pad(out[:, ids.shape[1] :], (0, tokens - out.shape[1] + ids.shape[1]), value=-1)


def summarise(
    cells: Sequence[Cell],
    answers: Sequence[list[bool]],
    dense: Sequence[list[bool]],
    *,
    ratios: Sequence[float | None] | None = None,
) -> dict[str, dict]:
    """By kind: accuracy and dense accuracy at each context, and the ratio measured there (ratios: by cell);
    share_of_dense, the quotient of the two over all contexts (None where dense gets nothing right); kept, the part of
    dense's right answers that stays right, with its 95 % interval; dense_right, how many those are; by_depth, that part
    for facts told in each quarter of the text.
    """
    summary: dict[str, dict] = {}
    for kind in dict.fromkeys(cell.kind for cell in cells if cell.items):
        chosen = [i for i, cell in enumerate(cells) if cell.kind == kind]
        depth = np.array([item.depth for i in chosen for item in cells[i].items])
        ours, theirs = (np.array([right for i in chosen for right in side[i]]) for side in (answers, dense))
        quarter = np.minimum((4 * depth).astype(int), 3)
        summary[kind] = {
            "accuracy": {str(cells[i].context): round(float(np.mean(answers[i])), 4) for i in chosen},
            "dense": {str(cells[i].context): round(float(np.mean(dense[i])), 4) for i in chosen},
            "ratio": {str(cells[i].context): ratios[i] for i in chosen} if ratios else {},
            "share_of_dense": _share(ours.sum(), theirs.sum()),
            "kept": _share((ours & theirs).sum(), theirs.sum()),
            "kept_interval": _interval(int((ours & theirs).sum()), int(theirs.sum())),
            "dense_right": int(theirs.sum()),
            "by_depth": {
                name: _share((ours & theirs)[quarter == i].sum(), theirs[quarter == i].sum())
                for i, name in enumerate(DEPTHS)
            },
        }
    return summary


def _interval(part: int, whole: int) -> list[float] | None:
    if not whole:
        return None
    found = wilson(part, whole)
    assert found.low is not None and found.high is not None
    return [round(found.low, 4), round(found.high, 4)]


def _share(part: float, whole: float) -> float | None:
    return round(float(part / whole), 4) if whole else None
