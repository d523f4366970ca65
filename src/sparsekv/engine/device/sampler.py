"""Logits to tokens, for a batch of samples that each have their own parameters.

logit_bias -> penalties -> temperature -> min_p -> top_k -> top_p -> the inverse of the cumulative distribution at one
uniform number per (seed, sample, position). Temperature 0 takes the largest logit. Everything stays on the device; what
is off for the whole batch costs nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.engine.device.history import TokenHistory
from sparsekv.engine.schedule.request import Sequence
from sparsekv.ops.noise import uniform


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The parameters of S samples, on the device: built once for as long as the same samples are in the batch."""

    seed: Tensor
    """int64 [S]."""
    index: Tensor
    """int64 [S]: which of its request's samples."""
    temperature: Tensor | None
    """float32 [S], 1 where greedy; None where all are."""
    greedy: Tensor | None
    """bool [S]; None where none or all are."""
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
    params = [s.request.params for s in sequences]
    trunks = [s if s.row is not None else s.request.sequences[0] for s in sequences]
    greedy, penalised = [p.greedy for p in params], [i for i, p in enumerate(params) if p.penalised]
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    integers = [(s.request.seed, s.index, t.row_(), p.top_k) for s, t, p in zip(sequences, trunks, params, strict=True)]
    seed, index, rows, top_k = upload(integers, torch.int64, device).unbind(-1)
    floats = [(p.temperature or 1.0, p.min_p, p.top_p) for p in params]
    temperature, min_p, top_p = upload(floats, torch.float32, device).unbind(-1)
    bias = [(i, t, b) for i, p in enumerate(params) for t, b in (p.logit_bias or {}).items()]
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params if p.penalised]
    return SamplingBatch(
        seed=seed,
        index=index,
        temperature=None if all(greedy) else temperature,
        greedy=upload(greedy, torch.bool, device) if any(greedy) and not all(greedy) else None,
        filters=(min_p, top_k, top_p) if any(p.filtered for p in params) else None,
        bias=_bias(bias, device) if bias else None,
        penalised=upload(penalised, torch.int64, device) if penalised else None,
        penalties=upload(penalties, torch.float32, device).T if penalised else None,
        rows=rows,
        logprobs=max(wanted) if wanted else None,
    )


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    positions: Tensor,
    history: TokenHistory,
    banned: tuple[Tensor, Tensor] | None = None,
) -> Sampled:
    """logits: [S, vocab]; positions: int64 [S], of the tokens to be sampled; banned: (sample, token), int64 [n]."""
    logits = raw = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if batch.bias is not None:
        sample_, token, value = batch.bias
        logits = logits.index_put((sample_, token), value.to(logits.dtype), accumulate=True)
    if banned is not None:
        logits = logits.index_put(banned, logits.new_full((), -torch.inf))
    if batch.penalised is not None and batch.penalties is not None:
        chosen = history.penalise(logits[batch.penalised], batch.rows[batch.penalised], batch.penalties)
        logits = logits.index_copy(0, batch.penalised, chosen)
    if batch.temperature is None:
        tokens = logits.argmax(-1)
    else:
        scaled = logits / batch.temperature[:, None]
        if batch.filters is not None:
            scaled = cut(scaled, *batch.filters)
        cumulative = scaled.double().softmax(-1).cumsum(-1)
        point = uniform(batch.seed, batch.index, positions)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        if batch.greedy is not None:
            tokens = torch.where(batch.greedy, logits.argmax(-1), tokens)
    return Sampled(tokens=tokens, logprobs=None if batch.logprobs is None else _logprobs(raw, tokens, batch.logprobs))


def _bias(found: list[tuple[int, int, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    samples, tokens, values = zip(*found, strict=True)
    sample_, token = upload([samples, tokens], torch.int64, device)
    return sample_, token, upload(values, torch.float32, device)


def cut(logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Minus infinity for tokens that the filters exclude. logits: [S, vocab]; the rest [S]. Keeps the largest."""
    ordered, order = torch.sort(logits, stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    out = ordered < ordered[:, :1] + min_p[:, None].log()
    out |= (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probabilities = ordered.masked_fill(out, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    out |= (before >= top_p[:, None]) & (top_p[:, None] < 1)
    out[:, 0] = False
    return logits.masked_fill(torch.empty_like(out).scatter_(-1, order, out), -torch.inf)


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    rank = (logprobs > chosen).sum(-1) + 1
    top, ids = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
    return chosen[:, 0], rank, top, ids


def upload(data: list | tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from host data, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(data, dtype=dtype, device=device)
    return torch.tensor(data, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
