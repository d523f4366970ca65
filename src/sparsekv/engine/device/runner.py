"""Runs what the scheduler decided. It alone touches the device.

A step is one packed forward [1, T]: the last token of each decoding row, which never leaves the device, then chunks of
prompts. With CUDA graphs it is two: decodes replay theirs whatever else comes, and chunks follow in one of their own,
or compiled where there are many tokens. Nothing here waits for the device but Pending.result() and the operations that
change rows: release, fork, swap.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.attend import Part
from sparsekv.cache.ragged import RaggedCache
from sparsekv.cache.swap import SwappedRow, swap_in, swap_out
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.chunk_graphs import ChunkGraphs
from sparsekv.engine.device.graphs import DecodeGraphs
from sparsekv.engine.device.history import TokenHistory
from sparsekv.engine.device.limits import banned, forced
from sparsekv.engine.device.regions import CompiledForward
from sparsekv.engine.device.sampler import SamplingBatch, logprobs_of, sample, sampling_batch
from sparsekv.engine.schedule.ledger import Lengths
from sparsekv.engine.schedule.request import Sequence
from sparsekv.engine.schedule.scheduler import Chunk, RunStep
from sparsekv.ops.layout import Batch
from sparsekv.ops.transfer import download, upload

LOGPROBS = ("logprob", "rank", "top", "ids")
"""What sampler.logprobs_of gives."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step left, on the host; S samples."""

    tokens: list[int]
    logprobs: list[tuple[float, int, list[float], list[int]]] | None
    """Per sample: the token's log-probability and rank, the most probable ones' and their ids."""
    prompt_logprobs: list[tuple[float, int, list[float], list[int]]]
    """The same of the tokens that follow those that chunks score, in order."""
    lengths: Lengths
    """int32 [layers, rows, kv_heads]."""
    free: int
    reads: NDArray[np.int64] | None
    """int64 [2, layers, rows + 1, kv_heads]: tokens, and pages whose bounds, that each row ever read, where that is not
    what they hold."""


class Pending:
    """A step under way: copies to the host that have been enqueued."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = {name: download(tensor) for name, tensor in tensors.items()}
        self._event = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepResult:
        """Waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        t = self._tensors
        return StepResult(
            tokens=t["tokens"].tolist(),
            logprobs=self._logprobs("") if "logprob" in t else None,
            prompt_logprobs=self._logprobs("prompt ") if "prompt logprob" in t else [],
            lengths=t["lengths"].numpy(),
            free=int(t["free"]),
            reads=t["reads"].numpy() if "reads" in t else None,
        )

    def _logprobs(self, of: str) -> list[tuple[float, int, list[float], list[int]]]:
        return list(zip(*(self._tensors[of + name].tolist() for name in LOGPROBS), strict=True))


class Runner:
    """model: attached, in evaluation mode; cache: over rows that are all empty; graphs: for decodes; chunk_graphs: for
    short chunks; forward: compiled, for all else, that of the graphs where there are any; None = the model as it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: EngineCache,
        *,
        graphs: DecodeGraphs | None = None,
        chunk_graphs: ChunkGraphs | None = None,
        forward: CompiledForward | None = None,
    ) -> None:
        self.model: Any = model
        self.cache = cache
        self.ragged: RaggedCache = cache.ragged
        self.device = self.ragged.lengths.device
        self.graphs = graphs
        self.chunk_graphs = chunk_graphs
        self.forward = graphs.forward if graphs is not None else forward
        self.history = TokenHistory(self.ragged.rows, self.device)
        self.last_token = torch.zeros(self.ragged.rows, dtype=torch.int64, device=self.device)
        self._batch: tuple[list[Sequence], SamplingBatch] | None = None

    # A step

    @torch.no_grad()
    def execute(self, step: RunStep) -> Pending:
        """Enqueue a step. Returns at once on a GPU."""
        chunks, samples, count = step.chunks, step.samples, len(step.decodes)
        placed = np.array([s.placed for s in step.decodes], dtype=np.int64)
        started = [s.total for s in samples[count:]]
        flat = torch.from_numpy(np.concatenate([step.rows, placed, placed + 1, started]).astype(np.int64))
        rows, positions, targets = upload(flat, torch.int64, self.device).split([count, count, len(samples)])
        most = int(placed.max(initial=0)) + 1
        logits = self._logits(rows, positions, chunks, most=most)
        scored = sum(chunk.scored for chunk in chunks)
        logits, prompts = logits[: len(logits) - scored], logits[len(logits) - scored :]
        tensors = self._sample(logits, samples, chunks, targets) if samples else {"tokens": targets}
        if scored:
            tensors |= self._score(prompts, chunks)
        tensors |= {"lengths": self.ragged.lengths, "free": self.ragged.pool.free_count}
        if self.cache.reads is not None:
            tensors["reads"] = self.cache.reads
        return Pending(tensors)

    def _logits(self, rows: Tensor, positions: Tensor, chunks: list[Chunk], *, most: int) -> Tensor:
        """Logits [samples' sources, vocab]: of each decode, and of the last token of each prompt that is complete; then
        of the tokens that chunks score. most: at least the tokens of any decoding sequence."""
        if self.graphs is None:
            return self._packed(rows, positions, chunks, most=most)
        found = [self.graphs.run(self.last_token[rows], rows, positions)] if len(rows) else []
        if chunks:
            found.append(self._prompts(chunks))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _prompts(self, chunks: list[Chunk]) -> Tensor:
        """As _logits, of chunks beside recorded decodes."""
        part, ids, positions, keep = self._chunks(chunks, 0)
        logits = None if self.chunk_graphs is None else self.chunk_graphs.run(part, ids, positions, keep)
        if logits is None:
            self.cache.parts = (None, part)
            logits = self._run(ids[None], positions[None], keep)
        self._finish_prompts(chunks)
        return logits

    def _packed(self, rows: Tensor, positions: Tensor, chunks: list[Chunk], *, most: int) -> Tensor:
        """As _logits, in one forward."""
        n, ids = len(rows), self.last_token[rows]
        keep = torch.arange(n, device=self.device)
        decode = prefill = None
        if n:
            starts = torch.arange(n + 1, dtype=torch.int32, device=self.device)
            batch = Batch(rows=rows, starts=starts, longest=1)
            decode = Part(batch=batch, seen=positions.int(), tokens=n, most=most)
        if chunks:
            prefill, new_ids, new_positions, ends = self._chunks(chunks, n)
            ids, positions = torch.cat([ids, new_ids]), torch.cat([positions, new_positions])
            keep = torch.cat([keep, ends])
        self.cache.parts = (decode, prefill)
        logits = self._run(ids[None], positions[None], keep)
        self._finish_prompts(chunks)
        return logits

    def _run(self, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self.forward is not None:
            return self.forward(ids, positions, keep)
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits[0]

    def _chunks(self, chunks: list[Chunk], first: int) -> tuple[Part, Tensor, Tensor, Tensor]:
        """The part, token ids and positions [T], and where the complete prompts end, then what is scored, `first`
        tokens further on."""
        counts = [c.count for c in chunks]
        starts = np.cumsum([0, *counts]).tolist()
        ids = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]]
        at = [p for c in chunks for p in range(c.start, c.start + c.count)]
        ends = [first + end - 1 for c, end in zip(chunks, starts[1:], strict=True) if c.samples]
        ends += [first + start + i for c, start in zip(chunks, starts, strict=False) for i in range(c.scored)]
        b, t = len(chunks), len(ids)
        flat = [c.sequence.row_() for c in chunks] + [c.start for c in chunks] + starts + ends + ids + at
        rows, seen, offsets, end, ids, at = upload(flat, torch.int64, self.device).split([b, b, b + 1, len(ends), t, t])
        # At least 2: a chunk of one token is still prefill, not a decode step.
        batch = Batch(rows=rows, starts=offsets.int(), longest=max(2, *counts))
        most = max(c.start + c.count for c in chunks)
        return Part(batch=batch, seen=seen.int(), tokens=t, most=most), ids, at, end

    def _finish_prompts(self, chunks: list[Chunk]) -> None:
        """Let policies prune the prompts that are complete."""
        done = [c for c in chunks if c.samples]
        if done and any(policy.prunes for policy in self.cache.executor.policies):
            rows = upload([c.sequence.row_() for c in done], torch.int64, self.device)
            self.cache.executor.finish_prompts(rows, max(c.start + c.count for c in done))

    def _sample(
        self, logits: Tensor, samples: list[Sequence], chunks: list[Chunk], positions: Tensor
    ) -> dict[str, Tensor]:
        for chunk in chunks:
            if chunk.samples and chunk.sequence.request.params.penalised:
                self._load_history(chunk.sequence)
        if len(logits) < len(samples):  # several samples start from one prompt
            logits = logits[upload(_sources(samples), torch.int64, self.device)]
        batch, limits = self._sampling_batch(samples), {}
        if batch.limited:
            limits = {"banned": self._upload_pairs(banned(samples)), "forced": self._upload_pairs(forced(samples))}
        sampled = sample(logits, batch, positions=positions, history=self.history, **limits)
        rows, tokens = batch.rows, sampled.tokens
        if any(len(chunk.samples) > 1 for chunk in chunks):
            owners = [i for i, s in enumerate(samples) if s.row is not None]
            index = upload(owners, torch.int64, self.device)
            rows, tokens = rows[index], tokens[index]
        self.last_token[rows] = tokens
        self.history.add(rows, tokens)
        if sampled.logprobs is None:
            return {"tokens": sampled.tokens}
        return {"tokens": sampled.tokens} | dict(zip(LOGPROBS, sampled.logprobs, strict=True))

    def _score(self, logits: Tensor, chunks: list[Chunk]) -> dict[str, Tensor]:
        """Log-probabilities of the prompts' next tokens. logits: of the tokens that chunks score."""
        known = [c.sequence.tokens[c.start + 1 : c.start + 1 + c.scored] for c in chunks]
        tokens = upload([token for each in known for token in each], torch.int64, self.device)
        count = max(c.sequence.request.params.prompt_logprobs or 0 for c in chunks)
        return {f"prompt {name}": x for name, x in zip(LOGPROBS, logprobs_of(logits, tokens, count), strict=True)}

    def _sampling_batch(self, samples: list[Sequence]) -> SamplingBatch:
        if self._batch is None or self._batch[0] != samples:
            self._batch = samples, sampling_batch(samples, self.device)
        return self._batch[1]

    def _upload_pairs(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | None:
        if not pairs:
            return None
        sample_, token = upload(pairs, torch.int64, self.device).unbind(-1)
        return sample_, token

    # Rows

    def assign(self, sequence: Sequence) -> None:
        """The sequence's row has just been forked or swapped in: give the device what it needs to go on."""
        self._batch = None
        self.ragged.samples[sequence.row_()].fill_(sequence.index)  # tensor[row] = number waits for the device
        if sequence.decoding:
            self.last_token[sequence.row_()].fill_(sequence.tokens[-1])
            if sequence.request.params.penalised:
                self._load_history(sequence)

    def _load_history(self, sequence: Sequence) -> None:
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        self.history.load(sequence.row_(), sequence.request.prompt, sequence.output, vocab=vocab)

    @torch.no_grad()
    def release(self, rows: list[int]) -> None:
        """Free the pages of rows, behind the steps in flight. Returns at once on a GPU."""
        self._batch = None
        self.ragged.release(upload(rows, torch.int64, self.device))

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the cache, whatever state it is in."""
        self._batch = None
        self.cache.reset()
        self.ragged.reset()

    def fork_cost(self, row: int) -> int:
        """Pages that a copy of the row takes."""
        return self.ragged.fork_cost(torch.tensor([row], device=self.device))

    @torch.no_grad()
    def fork(self, row: int, targets: list[int]) -> None:
        """Make empty rows exact copies of `row`."""
        to = torch.tensor(targets, device=self.device)
        self.ragged.fork(torch.full_like(to, row), to)

    @torch.no_grad()
    def swap_out(self, row: int) -> SwappedRow:
        """A copy of the row in host memory; the row stays."""
        return swap_out(self.ragged, row)

    @torch.no_grad()
    def swap_in(self, row: int, swapped: SwappedRow) -> None:
        """Fill an empty row from host memory, behind the steps in flight. Returns at once on a GPU."""
        swap_in(self.ragged, row, swapped)

    def account(self) -> tuple[Lengths, int]:
        """Lengths and free pages now. Waits for the device."""
        return self.ragged.lengths.to("cpu", copy=True).numpy(), self.ragged.pool.pages_free


def _sources(samples: list[Sequence]) -> list[int]:
    """For each sample, which row of the logits it is drawn from: its own, or that of its request's first sample."""
    sources: list[int] = []
    for sequence in samples:
        own = sequence.row is not None
        sources.append((sources[-1] + 1 if sources else 0) if own else sources[-1])
    return sources
