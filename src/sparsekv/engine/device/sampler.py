"""Logits to tokens, for a batch of samples that each have their own parameters.

logit_bias -> penalties -> ops.draw: temperature, min_p, top_k, top_p, and one uniform number per (seed, sample,
position). Temperature 0 takes the largest logit. Everything stays on the device; what is off for the whole batch costs
nothing.
"""

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.engine.device.history import TokenHistory
from sparsekv.engine.schedule.request import Sequence
from sparsekv.ops.draw import draw
from sparsekv.ops.transfer import upload


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The parameters of S samples, on the device: built once for as long as the same samples are in the batch."""

    seed: Tensor
    """int64 [S]."""
    index: Tensor
    """int64 [S]: which of its request's samples."""
    temperature: Tensor | None
    """float32 [S], 0 where greedy; None where all are."""
    filters: tuple[Tensor, Tensor, Tensor] | None
    """min_p float32, top_k int64 and top_p float32, [S]; None where all are off."""
    penalised: Tensor | None
    """int64: which samples have penalties."""
    penalties: Tensor | None
    """float32 [3, those]: repetition, presence, frequency."""
    rows: Tensor
    """int64 [S]: the row whose history counts, that of its request's first sample where it has none yet."""
    logprobs: int | None
    """The largest number of log-probabilities asked for."""
    limited: bool
    """Whether some tokens may be banned or forced (device.limits)."""
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    """logit_bias: sample and token int64, value float32, [those]."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Tensors on the device, S samples."""

    tokens: Tensor
    """int64 [S]."""
    logprobs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """Of the sampled token: float32 [S] and its rank int64 [S]; of the most probable: float32 and ids int64 [S, n]."""


def sampling_batch(sequences: list[Sequence], device: torch.device) -> SamplingBatch:
    """The parameters of these samples."""
    groups = [(request, len(list(each))) for request, each in groupby(sequences, attrgetter("request"))]
    requests, counts = [request for request, _ in groups], [count for _, count in groups]
    params = [request.params for request in requests]
    integers = _each(np.array([(r.seed, r.params.top_k) for r in requests], dtype=np.int64), counts, device)
    floats = _each(np.array([(p.temperature, p.min_p, p.top_p) for p in params], dtype=np.float32), counts, device)
    rows = [s.row if s.row is not None else s.request.sequences[0].row_() for s in sequences]
    index, row = upload([[s.index for s in sequences], rows], torch.int64, device)
    rare = any(p.penalised or p.logit_bias for p in params)
    own = list(enumerate(s.request.params for s in sequences)) if rare else []
    penalised = [i for i, p in own if p.penalised]
    bias = [(i, t, b) for i, p in own for t, b in (p.logit_bias or {}).items()]
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p in own if p.penalised]
    return SamplingBatch(
        seed=integers[0],
        index=index,
        temperature=None if all(p.greedy for p in params) else floats[0],
        filters=(floats[1], integers[1], floats[2]) if any(p.filtered for p in params) else None,
        bias=_bias(bias, device) if bias else None,
        penalised=upload(penalised, torch.int64, device) if penalised else None,
        penalties=upload(penalties, torch.float32, device).T if penalised else None,
        rows=row,
        logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
        limited=any(p.min_tokens or p.thinking for p in params),
    )


def _each(columns: NDArray, counts: list[int], device: torch.device) -> Tensor:
    """columns: [requests, n]. Returns [n, samples]: each request's once for each of its samples."""
    host = torch.from_numpy(np.repeat(columns.T, counts, axis=1))
    return upload(host, host.dtype, device)


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    positions: Tensor,
    history: TokenHistory,
    banned: tuple[Tensor, Tensor] | None = None,
    forced: tuple[Tensor, Tensor] | None = None,
) -> Sampled:
    """logits: [S, vocab]; positions: int64 [S], of the tokens to be sampled; banned, forced: (sample, token), int64
    [n]."""
    raw = logits
    if batch.bias is not None:
        sample_, token, value = batch.bias
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits.index_put((sample_, token), value.to(logits.dtype), accumulate=True)
    if banned is not None:
        logits = logits.index_put(banned, logits.new_full((), -torch.inf))
    if batch.penalised is not None and batch.penalties is not None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = history.penalise(logits[batch.penalised], batch.rows[batch.penalised], batch.penalties)
        logits = logits.index_copy(0, batch.penalised, chosen)
    if batch.temperature is None:
        tokens = logits.argmax(-1)
    else:
        noise = (batch.seed, batch.index, positions)
        tokens = draw(logits, noise, temperature=batch.temperature, filters=batch.filters)
    if forced is not None:
        tokens = tokens.index_put((forced[0],), forced[1])
    return Sampled(tokens=tokens, logprobs=None if batch.logprobs is None else logprobs_of(raw, tokens, batch.logprobs))


def _bias(found: list[tuple[int, int, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    samples, tokens, values = zip(*found, strict=True)
    sample_, token = upload([samples, tokens], torch.int64, device)
    return sample_, token, upload(values, torch.float32, device)


def logprobs_of(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits: [S, vocab]; tokens: int64 [S]. As Sampled.logprobs, with the `count` most probable."""
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = logprobs.gather(-1, tokens[:, None])
    rank = (logprobs > chosen).sum(-1) + 1
    top, ids = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
    return chosen[:, 0], rank, top, ids
