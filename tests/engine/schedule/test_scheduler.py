"""The scheduler alone: no torch, a pool that is only numbers."""

import random
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.engine.params import SamplingParams
from sparsekv.engine.schedule.ledger import Caps, Ledger
from sparsekv.engine.schedule.request import Request, Sequence, Status
from sparsekv.engine.schedule.scheduler import GiveUp, Idle, RunStep, Scheduler, Settle, SwapIn, SwapOut

LAYERS, HEADS, PAGE = 2, 2, 4


def test_it_never_imports_torch() -> None:
    """Its own imports: none of its modules' names resolve to torch, transformers or the device's half."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('sparsekv.engine'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['sparsekv.engine'] = package\n"
        "import sparsekv.engine.schedule.scheduler\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    import sparsekv.engine

    subprocess.run([sys.executable, "-c", code, sparsekv.engine.__path__[0]], check=True)


def _caps(in_prompt: int, held: int, *, layers: int = LAYERS, prunes: bool = False) -> Caps:
    return Caps(
        in_prompt=[in_prompt] * layers,
        held=lambda prompt, tokens: [min(held, tokens)] * layers,
        prunes=[prunes] * layers,
        max_tokens=1000,
    )


def _scheduler(
    *, pages: int, rows: int = 3, tokens: int = 16, ratio: float = 1.0, budget: int | None = None
) -> Scheduler:
    """budget: what a head keeps of a prompt, and holds from then on."""
    caps = _caps(1000, 1000 if budget is None else budget, prunes=budget is not None)
    ledger = Ledger(caps=caps, rows=rows, kv_heads=HEADS, page_size=PAGE, pages=pages)
    return Scheduler(ledger, rows=rows, max_tokens=tokens, ratio=ratio)


def _sequence(arrival: int, prompt: int, new: int = 4) -> Sequence:
    request = Request(
        id=str(arrival), arrival=arrival, prompt=[1] * prompt, params=SamplingParams(), seed=0, most_new=new
    )
    request.sequences = [Sequence(request=request, index=0, tokens=[1] * prompt, status=Status.WAITING)]
    return request.sequences[0]


class _Swapped:
    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        self.pages = int((-(-lengths // PAGE)).sum())
        self.lengths = self

    def numpy(self) -> np.ndarray:
        return self._lengths


class _Device:
    """Heads that keep each token with a probability of their own; a pool that must never run dry."""

    def __init__(self, scheduler: Scheduler, *, seed: int, budget: int | None = None) -> None:
        self.budget = budget
        self.scheduler, self.rng = scheduler, np.random.default_rng(seed)
        self.lengths = np.zeros_like(scheduler.ledger.lengths)
        self.keep = self.rng.uniform(0.1, 1.0, self.lengths.shape[::2])
        if budget is not None:
            self.keep[:] = 1.0
        self.flight: list[tuple[RunStep, np.ndarray, int]] = []
        """Steps, and what each left."""
        self.read_back: Counter[Sequence] = Counter()

    @property
    def free(self) -> int:
        return self.scheduler.ledger.pages - int((-(-self.lengths // PAGE)).sum())

    def refresh(self) -> None:
        self.scheduler.ledger.refresh(self.lengths.copy(), self.free)

    def run(self, step: RunStep) -> None:
        assert len(step.decodes) + sum(c.count for c in step.chunks) <= self.scheduler.max_tokens
        work = [(s.row, 1) for s in step.decodes] + [(c.sequence.row, c.count) for c in step.chunks]
        assert len({row for row, _ in work}) == len(work)
        for row, count in work:
            self.lengths[:, row] += self.rng.binomial(count, self.keep).astype(np.int32)
            if self.budget is not None and row in {s.row for s in step.decodes}:
                self.lengths[:, row] = np.minimum(self.lengths[:, row], self.budget)
        assert self.free >= 0, "the pool ran dry"
        for chunk in step.chunks:
            if chunk.samples and self.budget is not None:
                self.lengths[:, chunk.sequence.row] = np.minimum(self.lengths[:, chunk.sequence.row], self.budget)
        self.scheduler.issued(step)
        self.flight.append((step, self.lengths.copy(), self.free))

    def settle(self) -> list[Sequence]:
        """Read back the oldest step; returns the sequences that it finished."""
        step, lengths, free = self.flight.pop(0)
        self.read_back.update(step.samples)
        self.scheduler.ledger.settle(lengths, free)
        self.scheduler.observe_ratio(lengths.sum((0, 2)))
        return [s for s in step.samples if self.read_back[s] == s.request.most_new]

    def swap_out(self, sequence: Sequence) -> None:
        assert not self.flight
        row = self.scheduler.remove(sequence)
        sequence.swapped = _Swapped(self.lengths[:, row].copy())  # type: ignore[assignment]
        self.lengths[:, row] = 0
        sequence.status = Status.SWAPPED
        self.scheduler.add(sequence)
        self.refresh()

    def swap_in(self, sequence: Sequence, row: int) -> None:
        """Behind what is in flight."""
        self.scheduler.remove(sequence)
        self.scheduler.start(sequence, row)
        swapped: Any = sequence.swapped
        self.lengths[:, row] = swapped.numpy()
        assert self.free >= 0, "the pool ran dry"
        self.scheduler.ledger.filled(row, swapped.numpy(), swapped.pages)

    def end(self, sequence: Sequence) -> None:
        """Behind what is in flight."""
        row = self.scheduler.remove(sequence)
        if row is not None:
            self.lengths[:, row] = 0
            self.scheduler.ledger.emptied([row])


def _run_one(scheduler: Scheduler, sequence: Sequence) -> None:
    """The sequence's prompt is read, nothing of it forgotten, and it decodes."""
    device = _Device(scheduler, seed=0)
    device.keep[:] = 1.0
    scheduler.add(sequence)
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    device.run(step)
    device.settle()


@pytest.mark.parametrize("newcomer", [Status.WAITING, Status.SWAPPED])
@pytest.mark.parametrize(("pages", "comes"), [(19, False), (20, True)])
def test_a_newcomer_leaves_each_sequence_a_page_per_head(newcomer: Status, pages: int, comes: bool) -> None:
    """It needs four pages, one a head; one runs, holds four and takes four with its next token; two more steps of the
    worst case must fit beside them."""
    scheduler = _scheduler(pages=pages, tokens=64)
    _run_one(scheduler, _sequence(0, PAGE))
    second = _sequence(1, PAGE)
    if newcomer is Status.SWAPPED:
        second.swapped = _Swapped(np.full((LAYERS, HEADS), PAGE))  # type: ignore[assignment]
        second.status = newcomer
    scheduler.add(second)
    action = scheduler.decide(in_flight=False)
    assert comes == (isinstance(action, SwapIn) or bool(isinstance(action, RunStep) and action.chunks))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(25))
def test_everything_finishes_and_the_pool_never_runs_dry(seed: int, ahead: int) -> None:
    rng = random.Random(seed)
    pages = rng.randint(40, 120)
    scheduler = _scheduler(pages=pages, rows=rng.randint(1, 4), tokens=rng.randint(4, 20), ratio=rng.choice([1.0, 3.0]))
    scheduler.written *= seed % 2
    device = _Device(scheduler, seed=seed)
    todo = [_sequence(i, rng.randint(1, 30), rng.randint(1, 12)) for i in range(12)]
    done, given_up = [], []
    for _ in range(3000):
        if todo and rng.random() < 0.3:
            scheduler.add(todo.pop(0))
        action = scheduler.decide(in_flight=bool(device.flight))
        match action:
            case RunStep():
                device.run(action)
            case SwapOut(sequence=sequence):
                device.swap_out(sequence)
            case SwapIn(rows=rows):
                for sequence, row in rows:
                    device.swap_in(sequence, row)
            case GiveUp(sequence=sequence):
                given_up.append(sequence)
        finished = [action.sequence] if isinstance(action, GiveUp) else []
        while len(device.flight) > (0 if isinstance(action, Settle) else ahead):
            finished += device.settle()
        for sequence in finished:
            device.end(sequence)
        done += finished
        if not device.flight:
            device.refresh()
        assert scheduler.ledger.available() <= device.free
        if isinstance(action, Idle) and not todo:
            break
    assert len(done) == 12
    assert device.free == pages
    assert all(s.sampled == s.request.most_new for s in done if s not in given_up)


def test_decodes_come_first_and_prompts_in_order_of_arrival() -> None:
    scheduler = _scheduler(pages=1000, tokens=10)
    device = _Device(scheduler, seed=0)
    first, second = _sequence(0, 6), _sequence(1, 9)
    scheduler.add(second)
    scheduler.add(first)
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    assert [(c.sequence, c.start, c.count) for c in step.chunks] == [(first, 0, 6), (second, 0, 4)]
    assert step.samples == [first]
    device.run(step)
    step = scheduler.decide(in_flight=True)
    assert isinstance(step, RunStep)
    assert step.decodes == [first]
    assert [(c.sequence, c.start, c.count) for c in step.chunks] == [(second, 4, 5)]
    assert step.samples == [first, second]


def test_a_newcomer_waits_until_each_running_sequence_has_its_reserve() -> None:
    """8 pages of prompt each, 4 for the first one's step, and a page per head for the two of them."""
    for pages, together in ((28, True), (27, False)):
        scheduler = _scheduler(pages=pages)
        _run_one(scheduler, _sequence(0, 8))
        scheduler.add(_sequence(1, 8))
        step = scheduler.decide(in_flight=False)
        assert isinstance(step, RunStep)
        assert bool(step.chunks) == together


@pytest.mark.parametrize(("pages", "comes"), [(30, False), (31, True)])
def test_a_newcomer_leaves_what_all_will_have_grown(pages: int, comes: bool) -> None:
    """Expected to write 20 tokens: when the first ends, 19 steps on, both have grown by 19 tokens of 4 heads, 38 pages,
    of which 19 are left. They hold four pages each, and the first takes four with its next two tokens."""
    scheduler = _scheduler(pages=pages, tokens=64)
    scheduler.written = 20
    _run_one(scheduler, _sequence(0, PAGE, new=100))
    scheduler.add(_sequence(1, PAGE, new=100))
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    assert bool(step.chunks) == comes


def test_ends_tell_how_much_is_written() -> None:
    scheduler = _scheduler(pages=1000, tokens=64)
    scheduler.written = 20
    sequences = [_sequence(i, PAGE, new=100) for i in range(2)]
    for row, (sequence, sampled) in enumerate(zip(sequences, (40, 50), strict=True)):
        scheduler.start(sequence, row)
        sequence.sampled = sampled
    scheduler.remove(sequences[0])  # it is swapped out, and has not ended
    assert scheduler.written == 20
    scheduler.start(sequences[0], 0)
    for sequence, written in zip(sequences, (30, 50), strict=True):
        sequence.finish("stop")
        scheduler.remove(sequence)
        assert scheduler.written == written


@pytest.mark.parametrize(("pages", "comes"), [(35, False), (36, True)])
def test_samples_of_a_prompt_wait_for_pages_to_fork_into(pages: int, comes: bool) -> None:
    """12 pages that are held, or taken in two steps, by what runs and the prompt; 4 for each of the two forks, and 4
    for each of the four that then run."""
    scheduler = _scheduler(pages=pages, rows=48, tokens=64)
    _run_one(scheduler, _sequence(0, PAGE))
    many = _sequence(1, PAGE)
    many.request.params = SamplingParams(n=3)
    scheduler.add(many)
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    assert bool(step.chunks) == comes


def test_nothing_but_a_step_may_follow_a_step_in_flight() -> None:
    scheduler = _scheduler(pages=8)
    device = _Device(scheduler, seed=0)
    device.keep[:] = 1.0
    scheduler.add(_sequence(0, 8, new=20))
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    device.run(step)
    assert isinstance(scheduler.decide(in_flight=True), Settle)
    device.settle()
    assert isinstance(scheduler.decide(in_flight=False), GiveUp)


def test_the_ledger_bounds_what_is_taken() -> None:
    ledger = Ledger(caps=_caps(10, 10, layers=1), rows=2, kv_heads=2, page_size=4, pages=20)
    ledger.refresh(np.array([[[3, 4], [0, 9]]], dtype=np.int32), 15)
    assert ledger.growth([0], 1) == 1
    assert ledger.growth([0], 2) == 2
    assert ledger.growth([1], 100) == 3  # no head ever holds more than 10
    assert [ledger.fit(0, 50, pages) for pages in (0, 1, 2, 4)] == [0, 1, 4, 50]
    assert ledger.fit(0, 5, 4) == 5
    ledger.issue([0, 1], {})
    assert ledger.available() == 15 - 1 - 1
    ledger.settle(np.array([[[3, 5], [1, 9]]], dtype=np.int32), 13)
    assert ledger.available() == 13


def test_samples_of_a_prompt_wait_for_rows_to_fork_into() -> None:
    """A sixteenth of 32 rows at most: two of them, however many samples there are; nothing waits where nothing runs."""
    scheduler = _scheduler(pages=10**6, rows=32, tokens=1000)
    device = _Device(scheduler, seed=0)
    singles = [_sequence(i, 2, 100) for i in range(31)]
    for sequence in singles:
        scheduler.add(sequence)
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep) and len(step.chunks) == 31
    device.run(step)
    device.settle()
    many = _sequence(31, 2, 100)
    many.request.params = SamplingParams(n=4)
    scheduler.add(many)
    scheduler.add(_sequence(32, 2, 100))
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep) and not step.chunks
    device.run(step)
    device.settle()
    device.end(singles[0])
    device.refresh()
    step = scheduler.decide(in_flight=False)
    assert isinstance(step, RunStep)
    assert [chunk.sequence for chunk in step.chunks] == [many]


@given(data=st.data())
def test_the_ledger_counts_pages_exactly(data: st.DataObject) -> None:
    """What is in flight, and decode steps beyond it, take the pages of the longest that each head may become."""
    rows, page = 3, data.draw(st.sampled_from([1, 2, 4]))
    cap, in_prompt = data.draw(st.integers(1, 20)), data.draw(st.integers(20, 40))
    caps = _caps(in_prompt, cap)
    ledger = Ledger(caps=caps, rows=rows, kv_heads=HEADS, page_size=page, pages=1000)
    counts = st.lists(st.integers(0, cap), min_size=LAYERS * rows * HEADS, max_size=LAYERS * rows * HEADS)
    lengths = np.array(data.draw(counts), dtype=np.int32).reshape(LAYERS, rows, HEADS)
    ledger.refresh(lengths, 1000)
    steps = data.draw(st.lists(st.sets(st.integers(0, rows - 1)), max_size=3))
    for step in steps:
        ledger.issue(sorted(step), {})
    prompt = data.draw(st.integers(0, 9))
    if prompt:
        ledger.issue([], {0: prompt})

    def longest(length: int, row: int, more: int) -> int:
        if row == 0 and prompt:
            length = max(length, min(length + prompt, in_prompt))
        tokens = sum(row in step for step in steps) + more
        return max(length, min(length + tokens, cap))

    def held(more: int) -> int:
        return sum(-(-longest(int(n), row, more) // page) for (_, row, _), n in np.ndenumerate(lengths))

    now = sum(-(-int(n) // page) for n in lengths.flatten())
    assert ledger.available() == 1000 - (held(0) - now)
    for more in (1, 2, 5):
        assert ledger.growth(list(range(rows)), more) == held(more) - held(0)
