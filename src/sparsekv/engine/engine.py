"""The loop: ask the scheduler, run, read back, finish.

With async scheduling one step is in flight while the one before is read back. A sequence whose end is then found has
run one step too far: that token is dropped, and its place in the cache is that of the token it followed, so nothing is
lost. Rows are freed and swapped in behind what is in flight; a fork, a swap to the host, a session that is kept and a
cancellation first read it back.

One thread at a time, and no step is left half-way: after any exception `reset` makes the engine new (streams.py does).
"""

import random
import time
from collections import deque
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv.cache.pages import human_bytes
from sparsekv.engine.detokenizer import Detokenizer, decoder
from sparsekv.engine.device.runner import Pending, Runner, StepResult
from sparsekv.engine.finish import append_token, by_token
from sparsekv.engine.outputs import Session
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.request import Request, Sequence, Status, StopWhen
from sparsekv.engine.schedule.scheduler import GiveUp, Idle, RunStep, Scheduler, Settle, SwapIn, SwapOut


class Engine:
    """runner and scheduler agree on rows and pages. max_model_len: tokens of one sequence; vocab: token ids are below
    it; eos: token ids that end a text; tokenizer: for text out, or None."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        max_model_len: int,
        vocab: int,
        eos: frozenset[int] = frozenset(),
        tokenizer: Any = None,
        async_scheduling: bool = False,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._new_scheduler = deepcopy(scheduler)
        self.max_model_len = max_model_len
        self.vocab = vocab
        self.eos = eos
        self.tokenizer = tokenizer
        self.depth = 1 if async_scheduling else 0
        """Steps that may be in flight when `step` returns."""
        self.requests: dict[str, Request] = {}
        self.arrivals = 0
        self.preemptions = 0
        """Times that a running sequence was swapped out for want of pages."""
        self._in_flight: deque[tuple[RunStep, Pending]] = deque()
        self._ended: list[Sequence] = []
        self._forks: list[tuple[Sequence, list[Sequence]]] = []
        self._touched: dict[Request, None] = {}
        self._stale = False
        """Whether rows were freed whose pages the ledger may not know to be free."""
        self._reads = np.zeros((2, runner.ragged.rows + 1), dtype=np.int64)
        self._decode_one = lru_cache(2**16)(lambda token: None if tokenizer is None else tokenizer.decode([token]))

    # What users of the engine call

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._touched)

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        text: str | None = None,
        keep: bool = False,
        session: Session | None = None,
        request_id: str | None = None,
        stop_when: StopWhen | None = None,
    ) -> Request:
        """Queue a request. prompt: token ids, those after the session's where one is continued. stop_when: called with
        the finished samples whenever one more is; True ends the others. It must not raise.

        Raises ValueError for an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the context,
        a session of another engine, an id in use, or a request that the pool can never hold, naming the bytes.
        """
        tokens = [*session.tokens, *prompt] if session is not None else list(prompt)
        self._check(prompt, tokens, session)
        self._check_tokens("logit_bias", list(params.logit_bias or ()))
        self._check_tokens("the thinking budget's end marker", list(params.thinking.end if params.thinking else ()))
        if session is not None and params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs needs the whole prompt to be read; leave out session, or prompt_logprobs")
        request_id = str(self.arrivals) if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"request id {request_id!r} is in use; choose another")
        room = self.max_model_len - len(tokens)
        request = Request(
            id=request_id,
            arrival=self.arrivals,
            prompt=tokens,
            params=params,
            seed=random.getrandbits(63) if params.seed is None else params.seed % 2**63,
            most_new=room if params.max_tokens is None else min(room, params.max_tokens),
            text=text,
            keep=keep,
            stop_ids=frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos),
            heads=self.scheduler.ledger.heads,
            stop_when=stop_when,
        )
        self._check_memory(request)
        self.arrivals += 1
        request.sequences = [self._sequence(request, i, session) for i in range(params.n)]
        self.requests[request_id] = request
        self.scheduler.add(request.sequences[0])
        return request

    def step(self) -> list[Request]:
        """Run one step; returns every request that it changed. Finished ones have freed their pages."""
        self._advance()
        depth = 0 if any(_starts_samples(step) for step, _ in self._in_flight) else self.depth
        while len(self._in_flight) > depth:
            self._read_back()
        if self._forks or not self._in_flight or any(s.request.keep for s in self._ended):
            self._settle()
        elif self._ended:
            self._free()
            if not self.requests:
                self._settle()
        touched, self._touched = self._touched, {}
        return list(touched)

    def abort(self, *request_ids: str) -> None:
        """Cancel requests, those that are not finished yet, and free their pages at once."""
        self._settle()
        for request_id in request_ids:
            request = self.requests.get(request_id)
            for sequence in request.sequences if request is not None else ():
                self._end(sequence, "abort")
        self._settle()

    def reset(self) -> None:
        """Cancel every request and empty the cache, whatever state an exception left. Raises what the device raises."""
        for request in self.requests.values():
            for sequence in request.sequences:
                if sequence.status is not Status.FINISHED:
                    sequence.finish("abort")
                sequence.row = sequence.swapped = None
        for left in (self.requests, self._in_flight, self._ended, self._forks, self._touched):
            left.clear()
        self.scheduler = deepcopy(self._new_scheduler)
        self._stale = False
        self._reads = np.zeros_like(self._reads)
        self.runner.reset()

    # The loop

    def _advance(self) -> None:
        """Give the device its next step, and do what must come before it."""
        while True:
            match self.scheduler.decide(in_flight=bool(self._in_flight)):
                case RunStep() as step:
                    for chunk in step.chunks:
                        metrics = chunk.sequence.request.metrics
                        metrics.first_scheduled_time = metrics.first_scheduled_time or time.time()
                    self._in_flight.append((step, self.runner.execute(step)))
                    self.scheduler.issued(step)
                    return
                case Settle():
                    self._settle()
                case SwapOut(sequence=sequence):
                    self._swap_out(sequence)
                case SwapIn(rows=rows):
                    for sequence, row in rows:
                        self._swap_in(sequence, row)
                case GiveUp(sequence=sequence):
                    for each in sequence.request.sequences:
                        if each is sequence or each.status is Status.PENDING:
                            self._end(each, "length", stop_reason="kv_memory")
                    self._settle()
                case Idle():
                    return

    def _settle(self) -> None:
        """Read back everything in flight, fork what has been prefilled, free what has ended."""
        while self._in_flight:
            self._read_back()
        for trunk, children in self._forks:
            self._fork(trunk, children)
        self._forks.clear()
        for sequence in self._ended:
            if sequence.request.keep and sequence.finish_reason != "abort":
                self._keep(sequence)
        self._free()
        if self._stale:
            self._refresh()

    def _free(self) -> None:
        """Free what has ended, behind what is in flight."""
        rows = []
        for sequence in self._ended:
            row = self.scheduler.remove(sequence)
            sequence.swapped = None
            if row is not None:
                rows.append(row)
            if sequence.request.finished:
                self.requests.pop(sequence.request.id, None)
        self._ended.clear()
        if rows:
            self.runner.release(rows)
            self.scheduler.ledger.emptied(rows)
            self._stale = True

    def _refresh(self) -> None:
        """Have the ledger know what the device holds. Nothing is in flight."""
        self.scheduler.ledger.refresh(*self.runner.account())
        self._stale = False

    def _read_back(self) -> None:
        """Take in the oldest step in flight."""
        step, pending = self._in_flight.popleft()
        result = pending.result()
        self.scheduler.ledger.settle(result.lengths, result.free)
        held = self._count(step, result)
        for chunk in step.chunks:
            children = chunk.samples[1:]
            if children:
                for child in children:
                    child.placed, child.counters = chunk.sequence.placed, chunk.sequence.counters.copy()
                self._forks.append((chunk.sequence, children))
        scores = iter(result.prompt_logprobs)
        for chunk in step.chunks:
            request = chunk.sequence.request
            for token in chunk.sequence.tokens[chunk.start + 1 : chunk.start + 1 + chunk.scored]:
                count = request.params.prompt_logprobs or 0
                request.prompt_logprobs.append(by_token(token, next(scores), count, self._decode_one))
        now, touched, logprobs, spoke = time.time(), self._touched, result.logprobs, None
        for i, (sequence, token) in enumerate(zip(step.samples, result.tokens, strict=True)):
            if sequence.status is not Status.FINISHED:
                if sequence.request is not spoke:
                    spoke = sequence.request
                    touched[spoke] = None
                    spoke.metrics.spoke(now)
                append_token(sequence, token, None if logprobs is None else logprobs[i], self._decode_one)
                if sequence.finish_reason is not None:
                    self._end(sequence, sequence.finish_reason, stop_reason=sequence.stop_reason)
                    self._stop_others(sequence.request)
        self.scheduler.observe_ratio(held)

    def _count(self, step: RunStep, result: StepResult) -> NDArray[np.int64]:
        """Count what the step did for those it did not run too far. Returns the slots of each row, int64 [rows]."""
        held = result.lengths.sum(0, dtype=np.int64).sum(1)  # faster than both at once
        assert result.free >= 0, "a step took more pages than the ledger allowed"
        slots = held.tolist()
        for sequence, row in zip(step.decodes, step.rows, strict=True):
            if sequence.status is not Status.FINISHED:
                sequence.counters.history.append(slots[row])
        if result.reads is not None:
            total = result.reads.sum(1).sum(2)
            chosen = (total - self._reads).T.tolist()
            self._reads = total
            for sequence, row in zip(step.decodes, step.rows, strict=True):
                if sequence.status is not Status.FINISHED:
                    sequence.counters.chosen.extend(chosen[row])
        for chunk in step.chunks:
            if chunk.sequence.status is not Status.FINISHED:
                counters, over = chunk.sequence.counters, bool(chunk.samples)
                whole = self.scheduler.ledger.held_in_prompt(counters.held, chunk.count) if over else 0
                counters.read_prompt(chunk.count, held=slots[chunk.sequence.row_()], peak=whole, over=over)
        return held

    # Rows

    def _end(self, sequence: Sequence, reason: str, *, stop_reason: int | str | None = None) -> None:
        """Mark a sequence as finished; `_settle` frees what it owns."""
        if sequence.status is Status.FINISHED:
            return
        sequence.finish(reason, stop_reason=stop_reason)
        if sequence.request.finished:
            sequence.request.metrics.finished_time = time.time()
        self._ended.append(sequence)
        self._touched[sequence.request] = None

    def _stop_others(self, request: Request) -> None:
        """End what still runs where its caller has seen enough."""
        if request.stop_when is not None and not request.finished and request.stop_when(request.completed()):
            for sequence in request.sequences:
                self._end(sequence, "abort", stop_reason="stop_when")

    def _fork(self, trunk: Sequence, children: list[Sequence]) -> None:
        """Start the other samples of a request: as copies of its row, or from host memory where there is no room."""
        alive = [child for child in children if child.status is Status.PENDING]
        row, scheduler = trunk.row_(), self.scheduler
        count = min(len(alive), scheduler.forks(self.runner.fork_cost(row))) if alive else 0
        if len(alive) > count or (trunk.request.keep and any(c.status is Status.FINISHED for c in children)):
            swapped = self.runner.swap_out(row)
            for child in children:
                if child not in alive[:count]:
                    child.swapped = swapped
        for child in alive[count:]:
            child.status = Status.SWAPPED
            scheduler.add(child)
        if count:
            self.runner.fork(row, scheduler.free_rows[-count:])
            for child in alive[:count]:
                scheduler.start(child, scheduler.free_rows[-1])
                self.runner.assign(child)
            self._refresh()

    def _swap_out(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.swapped = self.runner.swap_out(sequence.row_())
        row = self.scheduler.remove(sequence)
        assert row is not None
        self.runner.release([row])
        sequence.status = Status.SWAPPED
        self.scheduler.add(sequence)
        self._refresh()

    def _swap_in(self, sequence: Sequence, row: int) -> None:
        swapped, sequence.swapped = sequence.swapped, None
        assert swapped is not None
        self.runner.swap_in(row, swapped)
        self.scheduler.ledger.filled(row, swapped.lengths.numpy(), swapped.pages)
        self.scheduler.remove(sequence)
        self.scheduler.start(sequence, row)
        self.runner.assign(sequence)

    def _keep(self, sequence: Sequence) -> None:
        state = sequence.swapped if sequence.row is None else self.runner.swap_out(sequence.row)
        if state is not None:
            tokens, placed = list(sequence.tokens), sequence.placed
            sequence.session = Session(tokens=tokens, placed=placed, state=state, owner=id(self))

    # New requests

    def _sequence(self, request: Request, index: int, session: Session | None) -> Sequence:
        status = Status.PENDING if index else Status.WAITING if session is None else Status.SWAPPED
        sequence = Sequence(request=request, index=index, tokens=list(request.prompt), status=status)
        if self.tokenizer is not None and request.params.detokenize:
            decode = decoder(self.tokenizer, skip_special_tokens=request.params.skip_special_tokens)
            sequence.detokenizer = Detokenizer(decode, sequence.tokens, prompt=len(request.prompt))
        if status is Status.SWAPPED and session is not None:
            sequence.placed = sequence.counters.prompt_seen = session.placed
            sequence.swapped = session.state
        return sequence

    def _check(self, prompt: list[int], tokens: list[int], session: Session | None) -> None:
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if session is not None and session.owner != id(self):
            raise ValueError("this session belongs to another LLM; continue it where it was made")
        self._check_tokens("the prompt", prompt)
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and the context is {self.max_model_len}, the output included; "
                "shorten it or raise max_model_len"
            )

    def _check_tokens(self, name: str, tokens: list[int]) -> None:
        wrong = next((t for t in tokens if isinstance(t, bool) or not isinstance(t, int | np.integer)), None)
        wrong = next((t for t in tokens if not 0 <= t < self.vocab), None) if wrong is None else wrong
        if wrong is not None:
            raise ValueError(f"{name} holds {wrong!r}; token ids are integers from 0 to {self.vocab - 1}")

    def _check_memory(self, request: Request) -> None:
        pool, needed = self.runner.ragged.pool, self.scheduler.pages_needed(request)
        if needed > pool.pages:
            raise ValueError(
                f"a request of {len(request.prompt)} prompt tokens and up to {request.most_new} new ones needs about "
                f"{human_bytes(needed * pool.page_bytes)} of KV memory and the pool has "
                f"{human_bytes(pool.pages * pool.page_bytes)}; raise kv_memory or the compression ratio, or lower "
                "max_tokens"
            )


def _starts_samples(step: RunStep) -> bool:
    """Whether several samples start from a prompt that this step completes: they fork before the first goes on."""
    return any(len(chunk.samples) > 1 for chunk in step.chunks)
