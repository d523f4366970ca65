"""The demo's measurement: one model reads, predicts, answers and continues, and the allocator is asked after each step.

Reading goes in chunks and the continuation is scored in chunks too (the same as token by token, which is how it goes
for a method that prunes the text that was read); answering is greedy decoding, one token a step, and the only part that
is timed and whose reads are counted.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsekv.cli.demo.task import Task
from sparsekv.evals.methods.steps import needs_steps
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.cache import SparseCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 128
"""Tokens per prefill chunk."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method's numbers at one ratio, all measured."""

    policy: str
    ratio_asked: float
    """1 = dense."""
    ratio_held: float
    kv_bytes: int
    """Bytes of the pages in use at the end."""
    kv_reads: float
    """Tokens attended to, averaged over layers and KV heads, summed over the answer's decode steps."""
    perplexity: float
    """Of the text that follows the context."""
    tokens_per_second: float
    """Of decoding."""
    answer: str
    right: bool
    text: str
    """The answer and what the model went on to say."""
    growth: list[tuple[int, int]]
    """(tokens seen, bytes held) after each chunk and each decoded token."""


def run_task(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: Task, *, ratio: float, generate: int
) -> Run:
    """Do the task with a model attached at `ratio` and decode `generate` tokens after the question."""
    cache, policy = SparseCache(model), attachment_of(model).policy
    growth: list[tuple[int, int]] = []
    with torch.inference_mode():
        logits = _read(model, cache, task.context, growth)
        chunk = 1 if needs_steps(policy) else CHUNK
        loss = _score(model, cache, task.continuation.split(chunk, dim=1), logits, growth)
        logits = _read(model, cache, task.ask, growth)
        reads = cache.stats().kv_reads
        new, seconds = _decode(model, cache, logits, generate, growth)
    text, said = str(tokenizer.decode(new)), str(tokenizer.decode(new, skip_special_tokens=True))
    stats = cache.stats()
    return Run(
        policy=policy.name,
        ratio_asked=ratio,
        ratio_held=stats.compression_ratio,
        kv_bytes=stats.bytes,
        kv_reads=stats.kv_reads - reads,
        perplexity=math.exp(loss),
        tokens_per_second=(generate - 1) / seconds,
        answer=said.strip().split("\n", 1)[0],
        right=task.is_right(text),
        text=text,
        growth=growth,
    )


def warm_up(model: "PreTrainedModel", task: Task) -> None:
    """Touch every code path once, so that the first run is not the slowest."""
    cache = SparseCache(model)
    with torch.inference_mode():
        logits = _read(model, cache, task.context[:, :CHUNK], [])
        _decode(model, cache, logits, 4, [])


def _read(model: "PreTrainedModel", cache: SparseCache, ids: Tensor, growth: list[tuple[int, int]]) -> Tensor:
    """Prefill; returns the last token's logits [vocabulary]."""
    logits = ids.new_zeros(0)
    for chunk in ids.split(CHUNK, dim=1):
        logits = model(chunk.to(model.device), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        growth.append(_size(cache))
    return logits


def _score(
    model: "PreTrainedModel",
    cache: SparseCache,
    chunks: Sequence[Tensor],
    before: Tensor,
    growth: list[tuple[int, int]],
) -> float:
    """Mean negative log-likelihood of ids, int64 [1, n] each, given what the cache holds. before: the logits that
    predict the first."""
    total, count = 0.0, 0
    for chunk in chunks:
        ids = chunk[0].to(model.device)
        logits = model(ids[None], past_key_values=cache).logits[0]
        predicted = torch.cat([before[None], logits[:-1]]).float()
        total += float(cross_entropy(predicted, ids, reduction="sum"))
        count += len(ids)
        before = logits[-1]
        growth.append(_size(cache))
    return total / count


def _decode(
    model: "PreTrainedModel", cache: SparseCache, logits: Tensor, count: int, growth: list[tuple[int, int]]
) -> tuple[list[int], float]:
    """`count` greedy tokens, ends of text included, and the seconds of the count - 1 steps that this takes."""
    token, new, seconds = logits.argmax(), [int(logits.argmax())], 0.0
    for _ in range(count - 1):
        start = time.perf_counter()
        logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
        token = logits.argmax()
        new.append(int(token))
        seconds += time.perf_counter() - start
        growth.append(_size(cache))
    return new, seconds


def _size(cache: SparseCache) -> tuple[int, int]:
    ragged = cache.ragged
    return int(ragged.seen[0, 0]), ragged.pool.pages_in_use * ragged.pool.page_bytes
