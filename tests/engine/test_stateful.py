"""Requests that come, go and are cancelled in any order: no page is lost, every output is its request's alone."""

from functools import cache
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving import alone, assert_empty, attached, engine, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.outputs import Session
from sparsekv.engine.schedule.request import Request

LENGTHS, NEW = (1, 4, 9, 14, 20), 20
PROMPTS = prompts(*LENGTHS)
_NEW = st.sampled_from([1, 3, NEW, NEW])
SAMPLED = {"temperature": 0.9, "seed": 3, "top_p": 0.95, "repetition_penalty": 1.1}


@cache
def _model(policy: str) -> Any:
    return attached(policy)


@cache
def _greedy(policy: str, prompt: tuple[int, ...]) -> list[int]:
    return alone(_model(policy), list(prompt), NEW)


@cache
def _sampled(policy: str, which: int) -> list[list[int]]:
    """Three samples from an engine that runs nothing else."""
    llm = engine(_model(policy), max_num_seqs=8)
    (output,) = llm.generate(PROMPTS[which], SamplingParams(n=3, max_tokens=NEW, **SAMPLED))
    return [c.token_ids for c in output.outputs]


class EngineMachine(RuleBasedStateMachine):
    """A pool of 40 to 70 pages, of which one sequence takes up to 40."""

    @initialize(
        policy=st.sampled_from(["dense", "dms", "lagged"]),
        pages=st.integers(40, 70),
        rows=st.integers(1, 4),
        budget=st.integers(4, 20),
        ahead=st.booleans(),
    )
    def start(self, policy: str, pages: int, rows: int, budget: int, ahead: bool) -> None:
        self.policy = policy
        self.llm: LLM = engine(
            _model(policy), pages=pages, max_num_seqs=rows, max_num_batched_tokens=budget, async_scheduling=ahead
        )
        self.expected: dict[str, list[list[int]]] = {}
        self.cancelled: set[str] = set()
        self.sessions: list[Session] = []

    @rule(many=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=4), keep=st.booleans(), new=_NEW)
    def add_greedy(self, many: list[int], new: int, keep: bool) -> None:
        for which in many:
            request = self.llm.engine.add(PROMPTS[which], SamplingParams(max_tokens=new, temperature=0), keep=keep)
            self.expected[request.id] = [_greedy(self.policy, tuple(PROMPTS[which]))[:new]]

    @rule(which=st.integers(0, len(LENGTHS) - 1), new=_NEW, n=st.integers(1, 3))
    def add_sampled(self, which: int, new: int, n: int) -> None:
        params = SamplingParams(n=n, max_tokens=new, **SAMPLED)
        request = self.llm.engine.add(PROMPTS[which], params)
        self.expected[request.id] = [tokens[:new] for tokens in _sampled(self.policy, which)[:n]]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), new=st.integers(1, 4))
    def go_on(self, data: st.DataObject, new: int) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        if len(session.tokens) < 34:
            request = self.llm.engine.add([7, 8], SamplingParams(max_tokens=new, temperature=0), session=session)
            self.expected[request.id] = [_greedy(self.policy, (*session.tokens, 7, 8))[:new]]

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._take(self.llm.engine.step())

    @precondition(lambda self: self.llm.engine.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = self.llm.engine.requests[data.draw(st.sampled_from(sorted(self.llm.engine.requests)))]
        self.llm.engine.abort(request.id)
        assert not set(request.sequences) & {*self._scheduler.running, *self._scheduler.swapped}
        self.cancelled.add(request.id)

    @invariant()
    def pages_are_conserved(self) -> None:
        """Free pages and owned ones are all there are, counted with their owners."""
        ragged = self.llm.engine.runner.ragged
        owned = -(-ragged.lengths // ragged.pool.page_size)
        assert int(owned.sum()) - int(ragged.pool.extra_owners.sum()) == ragged.pool.pages_in_use
        assert self._scheduler.ledger.available() <= ragged.pool.pages_free
        rows = {s.row for s in self._scheduler.running}
        assert not ragged.lengths[:, [r for r in range(ragged.rows) if r not in rows]].any()

    def teardown(self) -> None:
        for _ in range(4000):
            if not self.llm.engine.has_work:
                break
            self._take(self.llm.engine.step())
        assert_empty(self.llm)
        assert set(self.expected) <= self.cancelled

    @property
    def _scheduler(self) -> Any:
        return self.llm.engine.scheduler

    def _take(self, changed: list[Request]) -> None:
        for output in [request.output() for request in changed]:
            expected = self.expected[output.request_id]
            for c, tokens in zip(output.outputs, expected, strict=True):
                assert c.token_ids == tokens[: len(c.token_ids)]
            if output.finished and output.request_id not in self.cancelled:
                assert [c.token_ids for c in output.outputs] == expected
                del self.expected[output.request_id]
                if output.session is not None:
                    self.sessions.append(output.session)


EngineMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
test_in_any_order = EngineMachine.TestCase
