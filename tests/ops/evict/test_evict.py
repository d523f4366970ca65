"""The kernels choose and remember what the reference does, bit for bit, on any lengths, in tiles of any size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paging import DEVICE, paged
from sparsekv.ops.evict import at_random, least_important, least_shared, record, triton, when_full
from sparsekv.ops.layout import slot_places
from sparsekv.ops.noise import uniform

LENGTHS = [[40, 39], [0, 41], [70, 40], [40, 5]]
ROWS = [3, -1, 0, 2]
"""A padded place among them; row 1 is not of the call."""


class Scene:
    """A layer whose slots remember random births, weights and prompts, many of them equal."""

    def __init__(self, lengths: list[list[int]], rows: list[int], *, page_size: int = 16, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = paged(lengths, page_size=page_size, seed=seed)
        self.rows = torch.tensor(rows, device=DEVICE)
        self.seen = self.draw(60, 90, len(rows))
        slots = (len(self.layer.kv) + 1, page_size)
        self.born, self.prompt = self.draw(0, 90, *slots), self.draw(0, 2, *slots).bool()
        self.weight = self.draw(-3, 9, *slots).float() / 8
        self.prompt_tokens, self.samples = self.draw(0, 60, len(lengths) + 1), self.draw(0, 9, len(lengths) + 1).long()

    def draw(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32).to(DEVICE)

    def least(self, backend: str, *, budget: int = 40, safe: int = 20) -> Tensor:
        options = {"seen": self.seen, "safe": safe, "budget": budget, "backend": backend}
        return least_important(self.layer, self.rows, self.weight, self.born, **options)

    def random(self, backend: str, *, budget: int = 40, recent: int = 20, seed: int = 5, index: int = 7) -> Tensor:
        options = {"seen": self.seen, "samples": self.samples, "recent": recent, "budget": budget, "backend": backend}
        state = (self.born, self.prompt, self.prompt_tokens)
        return at_random(self.layer, self.rows, *state, seed=seed, layer_index=index, **options)

    def where(self, b: int, head: int, slots: range) -> list[tuple[int, int]]:
        """Page and place of slots of a head."""
        row, size = int(self.rows[b]), self.layer.page_size
        return [(int(self.layer.pages[row, head, slot // size]), slot % size) for slot in slots]


@contextmanager
def tiles_of(slots: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "TILE", slots)
        yield


BOTH = pytest.mark.parametrize("backend", ["reference", "triton"])


@BOTH
def test_the_first_of_the_least_important_old_slots(backend: str) -> None:
    scene = Scene(LENGTHS, ROWS)
    got = scene.least(backend)
    for b, row in enumerate(ROWS):
        for head in range(2):
            if row < 0 or LENGTHS[row][head] < 40:
                assert got[b, head] == -1
                continue
            latest = int(scene.seen[b]) - 20
            old = [
                (float(scene.weight[at]), slot)
                for slot, at in enumerate(scene.where(b, head, range(40)))
                if scene.born[at] <= latest
            ]
            assert got[b, head] == min(old)[1]


@BOTH
def test_the_drawn_one_of_the_candidates(backend: str) -> None:
    """Each branch occurs: a prompt that fits beside the recent window, one that does not, a head below its budget."""
    scene = Scene(LENGTHS, ROWS)
    scene.prompt_tokens[:] = torch.tensor([20, 0, 21, 30, 0])
    got, seed, index = scene.random(backend), 5, 7
    for b, row in enumerate(ROWS):
        for head in range(2):
            if row < 0 or LENGTHS[row][head] < 40:
                assert got[b, head] == -1
                continue
            fits = int(scene.prompt_tokens[row]) <= 20
            candidates = [
                slot
                for slot, at in enumerate(scene.where(b, head, range(40)))
                if scene.born[at] <= int(scene.seen[b]) - 20 and not (fits and scene.prompt[at])
            ]
            keys = (seed, int(scene.samples[row]), index, head, int(scene.seen[b]))
            u = float(uniform(*(torch.tensor(key) for key in keys)))
            assert got[b, head] == candidates[int(u * len(candidates))]


@pytest.mark.parametrize("tile", [8, 4096])
@settings(max_examples=15)
@given(
    lengths=st.lists(st.lists(st.integers(0, 90), min_size=3, max_size=3), min_size=1, max_size=3),
    budget=st.integers(1, 50),
    recent=st.integers(0, 80),
    page_size=st.sampled_from([1, 5, 16]),
    key=st.sampled_from([0, 1, 2**31, 2**63 - 1]),
    seed=st.integers(0, 2**16),
)
def test_kernels_choose_as_the_reference_does(
    tile: int, lengths: list[list[int]], budget: int, recent: int, page_size: int, key: int, seed: int
) -> None:
    """Also where nothing may be chosen, in pages of any size."""
    scene = Scene(lengths, [-1, *range(len(lengths))][::-1], page_size=page_size, seed=seed)
    weights = scene.draw(0, 9, len(scene.rows), 3, 60).float() / 7
    with tiles_of(tile):
        check = scene.random
        assert torch.equal(
            check("triton", budget=budget, recent=recent, seed=key, index=seed % 3),
            check("reference", budget=budget, recent=recent, seed=key, index=seed % 3),
        )
        for dtype in (torch.float32, torch.float64):
            scene.weight = scene.weight.to(dtype)
            least = [scene.least(backend, budget=budget, safe=recent) for backend in ("reference", "triton")]
            assert torch.equal(*least)
            shared = [shared_victims(scene, weights.to(dtype), backend) for backend in ("reference", "triton")]
            assert torch.equal(*shared)
        full = [
            when_full(scene.layer, scene.rows, shared[0], budget=budget, backend=b) for b in ("reference", "triton")
        ]
        assert torch.equal(*full)


def shared_victims(scene: Scene, weights: Tensor, backend: str) -> Tensor:
    victim = torch.full((len(scene.layer.lengths) + 1,), -7, device=DEVICE)
    least_shared(scene.layer, scene.rows, weights, victim, backend=backend)
    return victim


@BOTH
def test_the_slot_least_important_to_all_heads(backend: str) -> None:
    """What lies beyond the length counts for nothing; rows that are not of the call keep what they have."""
    scene = Scene([[3, 3], [4, 4], [5, 5]], [1, -1, 0])
    weights = torch.tensor([[2.0, 1, 0, 1, 0], [0, 0, 9, 0, 0]], device=DEVICE).expand(3, 2, 5)
    victim = shared_victims(scene, weights, backend)
    assert victim.tolist() == [1, 1, -7, -7]
    got = when_full(scene.layer, scene.rows, victim, budget=4, backend=backend)
    assert got.tolist() == [[1, 1], [-1, -1], [-1, -1]]


@BOTH
def test_what_is_remembered_of_a_token(backend: str) -> None:
    """At the slot that it took, or the newest; nothing else changes, and padded and empty heads write nothing."""
    scene = Scene(LENGTHS, [3, -1, 0, 1])
    slots = torch.tensor([[7, -1], [3, -1], [-1, 0], [-1, 40]], dtype=torch.int32, device=DEVICE)
    taken = [(0, 0, 7), (0, 1, 4), (2, 0, 39), (2, 1, 0), (3, 1, 40)]
    born, weight, prompt = scene.born.clone(), scene.weight.clone(), scene.prompt.clone()
    for b, head, slot in taken:
        (at,) = scene.where(b, head, range(slot, slot + 1))
        born[at], weight[at], prompt[at] = scene.seen[b], 0, False
    state = {"weight": scene.weight, "prompt": scene.prompt}
    record(scene.layer, scene.rows, slots, scene.born, seen=scene.seen, backend=backend, **state)
    for got, want in ((scene.born, born), (scene.weight, weight), (scene.prompt, prompt)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("states", [(), ("weight",), ("prompt",)])
def test_only_what_is_given_is_written(states: tuple[str, ...]) -> None:
    """A slot beyond the page table has no place."""
    scene = Scene(LENGTHS, ROWS)
    slots = scene.draw(-1, 200, len(ROWS), 2)
    got = []
    for backend in ("reference", "triton"):
        own = {name: getattr(scene, name).clone() for name in ("born", "weight", "prompt")}
        given_ = {name: own[name] for name in states}
        record(scene.layer, scene.rows, slots, own["born"], seen=scene.seen, backend=backend, **given_)
        got.append(own)
    for name in ("born", "weight", "prompt"):
        assert torch.equal(got[0][name], got[1][name])
    at = slot_places(scene.layer, scene.rows, slots.long())
    assert (at == len(scene.layer.kv) * 16).any()


def calls(scene: Scene) -> list[Callable[[], object]]:
    victim = torch.zeros(len(scene.layer.lengths) + 1, dtype=torch.int64, device=DEVICE)
    weights = scene.draw(0, 9, len(scene.rows), 2, 60).float()
    slots = scene.least("triton")
    return [
        lambda: scene.least("triton"),
        lambda: scene.random("triton"),
        lambda: least_shared(scene.layer, scene.rows, weights, victim, backend="triton"),
        lambda: when_full(scene.layer, scene.rows, victim, budget=40, backend="triton"),
        lambda: record(scene.layer, scene.rows, slots, scene.born, seen=scene.seen, backend="triton"),
    ]


def test_a_batch_of_none() -> None:
    scene = Scene(LENGTHS, [])
    for call in calls(scene):
        call()
    assert scene.least("triton").shape == (0, 2)


@pytest.mark.gpu
def test_the_calls_are_recorded_without_waiting() -> None:
    scene = Scene(LENGTHS, ROWS)
    every = calls(scene)
    for call in every:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            for call in every[:2]:
                call()
            drawn, least = every[1](), every[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scene.seen += 3
    graph.replay()
    assert isinstance(drawn, Tensor) and torch.equal(drawn, scene.random("reference"))
    assert isinstance(least, Tensor) and torch.equal(least, scene.least("reference"))


def test_refusals_name_the_reason() -> None:
    scene = Scene(LENGTHS, ROWS)
    scene.born = scene.born[:-1]
    for call in (scene.least, scene.random):
        with pytest.raises(ValueError, match=r"born is .* this cache needs"):
            call("triton")
    with pytest.raises(ValueError, match=r"weights are \(1, 2, 5\); expected \[4, 2, any\]"):
        least_shared(scene.layer, scene.rows, torch.zeros(1, 2, 5), scene.samples)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        when_full(scene.layer, scene.rows, scene.samples, budget=3, backend="cuda")
