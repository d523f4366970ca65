"""calibrate: which offset on the logits gives which compression ratio, as it is measured on text.

z is recorded over N rows of T tokens. At offset o a key is marked iff z + o > 0, and gone at the end iff it is marked
and older than the window, so of the N * layers * heads * T keys

    held(o) = protected by the window + |{z <= -o among the rest}|,    ratio(o) = all keys / held(o),

and the offset for a ratio is minus an order statistic of z. Deeper layers' z move a little when earlier ones forget:
each offset is run, z recorded anew under it, and the offset mended until the measured ratio is within tolerance.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv import dms
from sparsekv.evals.corpus import Corpus, load_documents
from sparsekv.evals.forward import read
from sparsekv.evals.settings import CalibrationConfig
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import read_adapter, write_config
from sparsekv.modeling.attach import attach, attachment_of
from sparsekv.modeling.split import SplitModel
from sparsekv.policies.dms import DMSPolicy

TOLERANCE = 0.01
"""Relative, on the ratio."""
ROUNDS = 3
"""Attempts to reach it."""


@dataclass(frozen=True, kw_only=True)
class Dial:
    """A row of the table."""

    offset: float
    ratio: float
    """Measured: tokens seen / tokens held, the window counted."""


def calibrate(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    targets: Sequence[float],
    batch: int = 8,
    eviction: str = "cache",
    on_dial: Callable[[Dial], None] = lambda dial: None,
) -> list[Dial]:
    """The offset table of a model attached with DMS: one row for each target that the heads reach, ascending.

    rows: int64 [N, T], text; T decides what the ratios mean, since the window counts. eviction: "cache" measures what
    the cache's allocator holds, "mask" what the marks say (the same, faster on a GPU). The policy's own offset is put
    back. Raises ValueError for a model without DMS or heads that cannot reach even the lowest target.
    """
    policy = attachment_of(model).policy
    if not isinstance(policy, DMSPolicy):
        raise ValueError(f"policy {policy.name!r} has no offset to calibrate; attach with DMS")
    rows = rows.to(next(model.parameters()).device)
    with contexts.dense(model):
        split = SplitModel(model)
    previous, policy.offset = policy.offset, 0.0
    try:
        _, z = _measure(split, policy, rows, batch, eviction)
        table: list[Dial] = []
        for target in sorted(targets):
            dial, z = _dial(split, policy, rows, target, z=z, batch=batch, eviction=eviction)
            if dial is not None and (not table or dial.offset > table[-1].offset and dial.ratio > table[-1].ratio):
                table.append(dial)
                on_dial(dial)
    finally:
        policy.offset = previous
    if not table:
        raise ValueError(f"no ratio from {min(targets):g} on can be reached at {rows.shape[1]} tokens; use longer rows")
    return table


def recalibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: str,
    text: str,
    settings: CalibrationConfig,
    say: Callable[[str], None],
) -> list[Dial]:
    """Attach an adapter, measure its table on the held-out part of a text, and write it to the adapter's folder.

    Raises ValueError for an adapter that is not a local folder, or does not fit the model.
    """
    if not Path(adapter).is_dir():
        raise ValueError(f"there is no adapter folder {adapter}; the table is written into it, so it must be local")
    attach(model, adapter=adapter)
    held_out = Corpus(load_documents([text])[1], tokenizer)
    return fill_table(model, held_out, adapter=adapter, text=text, settings=settings, batch=1, say=say)


def fill_table(
    model: PreTrainedModel,
    held_out: Corpus,
    *,
    adapter: str,
    text: str,
    settings: CalibrationConfig,
    batch: int,
    say: Callable[[str], None],
) -> list[Dial]:
    """Measure the table of the attached heads, by length, and write it, and how it was measured, beside them; returns
    its rows at the length that the targets are for.

    On the CPU through the real cache, on a GPU, and for a lag that no cache can serve, by the marks. Of
    documents that are all shorter than the lengths, rows are as long as `rows` of them are.
    """
    attachment = attachment_of(model)
    eviction = "mask" if attachment.policy.lag > 1 or next(model.parameters()).is_cuda else "cache"
    most = min(held_out.longest, attachment.max_tokens)
    lengths = sorted(length for length in {settings.length, *settings.lengths} if length <= most)
    main = max(
        (length for length in lengths if length <= settings.length), default=held_out.fitting(settings.rows, most)
    )

    def rows(length: int) -> Tensor:
        return held_out.rows(min(settings.rows, max(1, settings.rows * main // length)), length)

    table = calibrate(
        model,
        rows(main),
        targets=settings.targets,
        batch=batch,
        eviction=eviction,
        on_dial=lambda dial: say(f"  offset {dial.offset:+.3f}  ratio {dial.ratio:.3f} at {main} tokens"),
    )
    offsets = [dial.offset for dial in table]
    ratios: dict[str, list[float]] = {}
    for length in lengths:
        if length != main:
            found = ratios_of(model, rows(length), offsets=offsets, batch=batch, eviction=eviction)
            say(f"  {length} tokens: " + " ".join(f"{ratio:.2f}" for ratio in found))
            ratios[str(length)] = found
    measured = {"text": text, "rows": settings.rows, "length": main, "eviction": eviction}
    config = read_adapter(adapter)[0]
    pairs = [(dial.offset, dial.ratio) for dial in table]
    write_config(adapter, replace(config, offsets=pairs, ratios=ratios, calibration=measured))
    return table


def ratios_of(
    model: PreTrainedModel, rows: Tensor, *, offsets: Sequence[float], batch: int = 8, eviction: str = "cache"
) -> list[float]:
    """The ratio that each offset gives rows, int64 [N, T], of text; the arguments are `calibrate`'s."""
    policy = attachment_of(model).policy
    assert isinstance(policy, DMSPolicy)
    rows = rows.to(next(model.parameters()).device)
    with contexts.dense(model):
        split = SplitModel(model)
    found = []
    for offset in offsets:
        with contexts.dialled(policy, offset):
            readings = [read(split, ids, eviction=eviction) for ids in rows.split(batch)]
        found.append(sum(reading.seen for reading in readings) / sum(reading.held for reading in readings))
    return found


def _dial(
    split: SplitModel,
    policy: DMSPolicy,
    rows: Tensor,
    target: float,
    *,
    z: Tensor,
    batch: int,
    eviction: str,
) -> tuple[Dial | None, Tensor]:
    """The best of a few attempts at one target, and the logits recorded last."""
    best: Dial | None = None
    for _ in range(ROUNDS):
        offset = offset_for(z, target, window=policy.window(0))
        if offset is None:
            return best, z
        policy.offset = offset
        ratio, z = _measure(split, policy, rows, batch, eviction)
        if best is None or abs(ratio - target) < abs(best.ratio - target):
            best = Dial(offset=offset, ratio=ratio)
        if abs(ratio / target - 1) < TOLERANCE:
            break
    return best, z


def offset_for(z: Tensor, target: float, *, window: int) -> float | None:
    """The offset at which logits z, float32 [..., T] without an offset, hold 1 / target of their keys; None where even
    the window holds more."""
    length = z.shape[-1]
    eligible = z[..., : max(length - window, 0)].flatten()
    kept = round(z.numel() / target) - (z.numel() - eligible.numel())
    if not 0 <= kept < eligible.numel():
        return None
    ordered = eligible.sort().values
    low = ordered[kept - 1] if kept else ordered[0] - 1
    return -float((low + ordered[kept]) / 2)


def _measure(split: SplitModel, policy: DMSPolicy, rows: Tensor, batch: int, eviction: str) -> tuple[float, Tensor]:
    """(measured ratio, z without the offset, aligned: float32 [layers, heads, N, T]) at the policy's offset."""
    seen, held = 0, 0.0
    parts = []
    for ids in rows.split(batch):
        with recorded_logits(policy) as recorded:
            reading = read(split, ids, eviction=eviction)
        seen, held = seen + reading.seen, held + reading.held
        chunks = [[part.unflatten(0, (len(ids), -1)) for part in recorded[layer]] for layer in sorted(recorded)]
        z = torch.stack([torch.cat(parts_of_layer, dim=1).permute(2, 0, 1) for parts_of_layer in chunks])
        parts.append(dms.align(z, policy.lag, fill=-torch.inf))
    return seen / held, torch.cat(parts, dim=2)


@contextmanager
def recorded_logits(policy: DMSPolicy) -> Iterator[dict[int, list[Tensor]]]:
    """Within, forwards leave their logits without the offset behind: by layer, float32 [B * S, kv_heads] of each."""
    recorded: dict[int, list[Tensor]] = defaultdict(list)
    logits = policy.logits

    def record(layer: int, hidden: Any, **kwargs: Any) -> Tensor:
        result = logits(layer, hidden, **kwargs)
        recorded[layer].append(result - policy.offset)
        return result

    policy.logits = record
    try:
        yield recorded
    finally:
        del policy.logits
