"""The oracles themselves: what must hold of each method whatever the tensors, and examples done by hand."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import (
    DMC,
    DMS,
    H2O,
    TOVA,
    Dense,
    DMSQuest,
    Quest,
    Random,
    SnapKV,
    Streaming,
    play,
    random_inputs,
    token_count,
    turns,
)

SHAPE = {"heads": 2, "group": 2}
ONE = {"heads": 1, "group": 1, "scale": 1.0}
SEEDS = st.integers(0, 2**20)
few = settings(max_examples=20)


def uniform(*name: int) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(hash(name) % 2**40), dtype=torch.float64).item()


def drawn(seed: int, count: int, chance: float = 0.5) -> torch.Tensor:
    """bool [count, heads]"""
    return torch.rand(count, SHAPE["heads"], generator=torch.Generator().manual_seed(seed)) < chance


def masked(query, key, value, visible):
    """Attention under a mask; visible: bool [queries, keys, H]."""
    key, value = (x.repeat_interleave(SHAPE["group"], 1) for x in (key, value))
    visible = visible.repeat_interleave(SHAPE["group"], 2)
    scores = torch.einsum("qhd,khd->qkh", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("qkh,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(1), value)


def ages(count):
    """[queries, keys, 1]"""
    position = torch.arange(count)
    return (position[:, None] - position)[..., None]


def column(*numbers):
    """One head of size 1: [tokens, 1, 1]."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Against masks


@given(SEEDS, turns())
@few
def test_dense_is_causal_attention(seed, turns):
    inputs = random_inputs(seed, count := token_count(turns))
    oracle = Dense(**SHAPE)
    same(play(oracle, turns, *inputs), masked(*inputs, (ages(count) >= 0).expand(-1, -1, SHAPE["heads"])))
    assert oracle.history == [[list(range(t + 1))] * SHAPE["heads"] for t in range(count)]
    assert oracle.peak == [count] * SHAPE["heads"]
    assert len(oracle.reads) == sum(decoded for _, decoded in turns)


@given(SEEDS, turns(), st.integers(1, 6), st.sampled_from(["decided now", "decided next", "immediate"]))
@few
def test_dms_is_the_mask_of_its_rule(seed, turns, window, when):
    inputs = random_inputs(seed, count := token_count(turns))
    marks = drawn(seed, count)
    lag = {"decided now": 0, "decided next": 1, "immediate": window}[when]
    about = torch.zeros_like(marks)
    about[: max(count - lag, 0)] = marks[lag:]
    age = ages(count)
    visible = (age >= 0) & (~about | (age < window))
    oracle = DMS(**SHAPE, window=window, lag=lag)
    same(play(oracle, turns, *inputs, marks=marks), masked(*inputs, visible))
    for t, heads in enumerate(oracle.history):
        assert [sorted(held) for held in heads] == [visible[t, :, h].nonzero().flatten().tolist() for h in range(2)]


def test_golden_example_of_dms():
    """Retention 0.2 0.9 0.3 0.8 0.1 0.95 of A..F, window 2: the held sets of the design, and their slots."""
    marks = torch.tensor([0.2, 0.9, 0.3, 0.8, 0.1, 0.95])[:, None] < 0.5
    oracle = DMS(**ONE, window=2)
    play(oracle, [(6, 0)], column(*range(6)), column(*range(6)), column(*range(6)), marks=marks)
    slots = ["".join("ABCDEF"[t] for t in heads[0]) for heads in oracle.history]
    assert ["".join(sorted(held)) for held in slots] == ["A", "AB", "BC", "BCD", "BDE", "BDEF"]
    assert slots == ["A", "AB", "CB", "CBD", "EBD", "EBDF"]


@given(SEEDS, turns(), st.integers(5, 10))
@few
def test_streaming_sees_sinks_and_a_recent_window_in_prompts_too(seed, turns, budget):
    inputs = random_inputs(seed, count := token_count(turns))
    age = ages(count)
    visible = (age >= 0) & ((age < budget - 4) | (torch.arange(count) < 4)[:, None])
    oracle = Streaming(**SHAPE, budget=budget)
    same(play(oracle, turns, *inputs), masked(*inputs, visible.expand(-1, -1, SHAPE["heads"])))
    assert oracle.peak == [min(count, budget)] * SHAPE["heads"]


# Equalities between methods

AMPLE = {
    "TOVA": lambda n: TOVA(**SHAPE, budget=n),
    "H2O": lambda n: H2O(**SHAPE, budget=n),
    "random": lambda n: Random(**SHAPE, budget=n, uniform=uniform),
    "SnapKV": lambda n: SnapKV(**SHAPE, budget=n + 33),
    "StreamingLLM": lambda n: Streaming(**SHAPE, budget=n + 4),
    "Quest, all pages": lambda n: Quest(**SHAPE, budget=n, page=1, layer=2),
    "Quest, layer 1": lambda n: Quest(**SHAPE, budget=1, page=1, layer=1),
}


@pytest.mark.parametrize("method", AMPLE)
@given(seed=SEEDS, turns=turns())
@few
def test_ample_budget_is_dense(method, seed, turns):
    inputs = random_inputs(seed, count := token_count(turns))
    oracle, dense = AMPLE[method](max(count, 2)), Dense(**SHAPE)
    assert torch.equal(play(oracle, turns, *inputs), play(dense, turns, *inputs))
    assert oracle.history == dense.history
    assert oracle.reads == dense.reads


@given(SEEDS, turns())
@few
def test_dmc_that_never_merges_is_dense(seed, turns):
    inputs = random_inputs(seed, count := token_count(turns))
    oracle, never = DMC(**SHAPE), torch.zeros(count, 2, dtype=torch.bool)
    out = play(oracle, turns, *inputs, merge=never, weights=torch.ones(count, 2))
    assert torch.equal(out, play(Dense(**SHAPE), turns, *inputs))


@given(SEEDS, turns())
@few
def test_dmc_is_dense_over_weighted_means(seed, turns):
    """The last query, against means taken run by run instead of one token after the other."""
    query, key, value = random_inputs(seed, count := token_count(turns))
    merge, weights = drawn(seed, count), 1 + random_inputs(seed, count, group=1)[0][..., 0].square()
    oracle = DMC(**SHAPE)
    out = play(oracle, turns, query, key, value, merge=merge, weights=weights)[-1]
    for h in range(2):
        opens = [t for t in range(count) if t == 0 or not merge[t, h]]
        assert oracle.held()[h] == opens
        runs = [range(a, b) for a, b in zip(opens, [*opens[1:], count], strict=True)]
        keys, values = (
            torch.stack([(weights[r, h, None] * x[r, h]).sum(0) / weights[r, h].sum() for r in runs])
            for x in (key, value)
        )
        for g in (2 * h, 2 * h + 1):
            same(out[g], (keys @ query[-1, g] / 2).softmax(0) @ values)


@given(SEEDS, turns(), st.integers(1, 6))
@few
def test_dms_with_quest_is_dms_with_all_pages_and_quest_without_marks(seed, turns, window):
    inputs = random_inputs(seed, count := token_count(turns))
    marks, none = drawn(seed, count, 0.7), drawn(seed, count, 0)
    both = DMSQuest(**SHAPE, window=window, budget=count, page=1, layer=2)
    dms = DMS(**SHAPE, window=window)
    assert torch.equal(play(both, turns, *inputs, marks=marks), play(dms, turns, *inputs, marks=marks))
    assert both.history == dms.history
    both = DMSQuest(**SHAPE, window=window, budget=1, page=2, layer=2)
    quest = Quest(**SHAPE, budget=1, page=2, layer=2)
    assert torch.equal(play(both, turns, *inputs, marks=none), play(quest, turns, *inputs))
    assert both.reads == quest.reads and both.bound_reads == quest.bound_reads


# Budgets

BUDGETED = {
    "TOVA": lambda n: TOVA(**SHAPE, budget=n),
    "H2O": lambda n: H2O(**SHAPE, budget=n),
    "random": lambda n: Random(**SHAPE, budget=n, uniform=uniform),
}


@pytest.mark.parametrize("method", BUDGETED)
@given(seed=SEEDS, turns=turns(), budget=st.integers(2, 9))
@few
def test_budget_is_filled_and_never_exceeded_after_the_prompt(method, seed, turns, budget):
    oracle = BUDGETED[method](budget)
    play(oracle, turns, *random_inputs(seed, token_count(turns)))
    held, peak, seen = 0, 0, 0
    for prompt, decoded in turns:
        for t in range(seen, seen + prompt - 1):
            held += 1
            assert [len(h) for h in oracle.history[t]] == [held] * 2  # read densely
        peak = max(peak, held + 1)
        seen += prompt
        held = min(held + 1, budget)
        assert [len(h) for h in oracle.history[seen - 1]] == [held] * 2
        if prompt > 1:  # a pruning keeps the order
            for before, after in zip(oracle.history[seen - 2], oracle.history[seen - 1], strict=True):
                assert after == [t for t in [*before, seen - 1] if t in after]
        for t in range(seen, seen + decoded):
            held = min(held + 1, budget)
            assert [len(h) for h in oracle.history[t]] == [held] * 2
            assert all(t in h for h in oracle.history[t])
        peak, seen = max(peak, held), seen + decoded
    assert oracle.peak == [peak] * 2


@given(SEEDS, turns(), st.integers(2, 9))
@few
def test_who_is_safe(seed, turns, budget):
    inputs = random_inputs(seed, token_count(turns))
    tova, h2o, rand = (BUDGETED[method](budget) for method in BUDGETED)
    for oracle in (tova, h2o, rand):
        play(oracle, turns, *inputs)
    assert all(first == second for first, second in tova.history)  # one choice for all KV heads
    prompts, start, ends = [], 0, {}
    for prompt, decoded in turns:
        prompts += range(start, start + prompt)
        ends[start + prompt - 1] = list(prompts)
        start += prompt + decoded
    safe = []
    for t in range(start):
        newest = set(range(max(t + 1 - budget // 2, 0), t + 1))
        safe = ends.get(t, safe)
        for h in range(2):
            assert newest <= set(h2o.history[t][h])
            assert newest <= set(rand.history[t][h])
            if len(safe) + budget // 2 <= budget:
                assert set(safe) <= set(rand.history[t][h])


@given(SEEDS, st.integers(33, 40), turns(most_turns=2, prompt=(1, 50), decoded=(0, 5)))
@few
def test_snapkv_prunes_prompts_only_and_keeps_the_last_32(seed, budget, turns):
    oracle = SnapKV(**SHAPE, budget=budget)
    play(oracle, turns, *random_inputs(seed, token_count(turns)))
    held, end = 0, 0
    for prompt, decoded in turns:
        end += prompt
        held = min(held + prompt, budget)
        for h in oracle.history[end - 1]:
            assert len(h) == held and h[-32:] == list(range(end))[-32:] and h == sorted(h)
        end, held = end + decoded, held + decoded
        assert [len(h) for h in oracle.history[end - 1]] == [held] * 2


# By hand. One head of size 1, scale 1: under the query 1 the key log(x) weighs in proportion to x, under -1 to 1/x.


def test_tova_by_hand():
    oracle = TOVA(**ONE, budget=2)
    key = column(log(1), log(2), log(5), log(3), log(7))
    out = play(oracle, [(3, 2)], column(1, 1, 1, -1, 1), key, column(0, 0, 16, 8, 24))
    # Weights under token 2: 1/8 2/8 5/8, so 0 goes. 3 takes the slot of 1 (2/8 < 5/8). Under its query, -1, slots 3 and
    # 2 weigh 1/3 : 1/5, so 4 takes the slot of 2.
    assert [h[0] for h in oracle.history] == [[0], [0, 1], [1, 2], [3, 2], [3, 4]]
    same(out.flatten(), torch.tensor([0, 0, 10, (8 * 5 + 16 * 3) / 8, (8 * 3 + 24 * 7) / 10], dtype=torch.float64))
    assert oracle.reads == [[2], [2]] and oracle.peak == [3]


def test_tova_averages_over_all_heads_and_may_lose_the_newest():
    oracle = TOVA(heads=2, group=1, scale=1.0, budget=2)
    key = torch.tensor([[1, 1], [9, 1], [1, 2], [5, 5]], dtype=torch.float64).log()[..., None]
    oracle.prompt(torch.ones(2, 2, 1), key[:2], key[:2])
    # Head 0 weighs 0 and 1 as 1/10 9/10, head 1 as 1/2 1/2: on average 0 goes, in both.
    oracle.decode(torch.ones(2, 1), key[2], key[2])
    assert oracle.held() == [[2, 1], [2, 1]]
    # Slots 2, 1: head 0 1/10 9/10, head 1 2/3 1/3: the mean of 2, the newest, is 23/60, and it goes.
    oracle.decode(torch.ones(2, 1), key[3], key[3])
    assert oracle.held() == [[3, 1], [3, 1]]


def test_h2o_by_hand():
    oracle = H2O(**ONE, budget=2)
    key = column(log(1), log(2), log(5), log(4), log(4), log(4))
    play(oracle, [(3, 3)], column(1, 1, 1, 1, 1, 1), key, key)
    # Sums after the prompt: 1 + 1/3 + 1/8, 2/3 + 2/8, 5/8. The newest is safe, and 0 is the best of the others.
    # 3 is the newest now, so 2 goes (5/8). Then 0 has 1.46 + 1/5 and 3 has 4/5: it began at nothing. So it goes, and
    # then 4 (4/5 too: with what its slot had summed up it would have stayed, and 0 gone).
    assert [h[0] for h in oracle.history] == [[0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]
    assert oracle.slots[0][0].importance == pytest.approx(1 + 1 / 3 + 1 / 8 + 3 / 5)
    assert oracle.slots[0][1].importance == pytest.approx(4 / 5)


def test_h2o_sums_over_a_group_and_each_head_chooses_alone():
    oracle = H2O(heads=2, group=2, scale=1.0, budget=2)
    key = torch.tensor([[1, 1], [2, 2], [1, 1]], dtype=torch.float64).log()[..., None]
    query = torch.ones(3, 4, 1)
    query[:, 2:] = -9  # head 1 prefers small keys
    query[:, 1] = 0
    oracle.prompt(query, key, key)
    # The newest, 2, stays. Head 0: token 0 has (1 + 1/3 + 1/4) + (1 + 1/2 + 1/3), 1 less. Head 1: 0 all the more.
    assert oracle.held() == [[0, 2], [0, 2]]
    assert oracle.slots[0][0].importance == pytest.approx(1 + 1 / 3 + 1 / 4 + 1 + 1 / 2 + 1 / 3)
    oracle.slots[1][0].importance = 0.0
    oracle.decode(query[2], key[2], key[2])
    assert oracle.held() == [[0, 3], [3, 2]]


def test_random_by_hand():
    table = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.3, 4: 0.7, 5: 0.99, 6: 0.0, 7: 0.5}
    asked = []

    def look_up(seed, sample, layer, head, position):
        asked.append((seed, sample, layer, head))
        return table[position]

    inputs = random_inputs(0, 8, heads=1, group=1)
    oracle = Random(heads=1, group=1, budget=4, uniform=look_up, seed=5, sample=6, layer=7)
    play(oracle, [(5, 3)], *inputs)
    # Prompt and recent window (2) exceed 4: 3 and 4 are recent, of 0 1 2 the greatest draws stay: 1 and 2.
    # 5 draws the last of 1 2 3 (4 is recent), 6 the first of 1 2 4, 7 the second of 2 5 4: by slot.
    assert [h[0] for h in oracle.history[4:]] == [[1, 2, 3, 4], [1, 2, 5, 4], [6, 2, 5, 4], [6, 2, 7, 4]]
    assert set(asked) == {(5, 0, 7, 0), (5, 6, 7, 0)}  # the prompt is its copies' too


def test_random_spares_at_most_64_recent_tokens():
    oracle = Random(heads=1, group=1, budget=140, uniform=lambda *name: 1 - 2**-53)
    play(oracle, [(141, 1)], *random_inputs(0, 142, heads=1, group=1))
    # Of equal draws the lowest goes: 0. Then 141 takes the newest of those beyond 78..141.
    assert oracle.held() == [[*range(1, 77), 141, *range(78, 141)]]


def test_random_spares_a_prompt_that_fits():
    oracle = Random(heads=1, group=1, budget=4, uniform=lambda *name: 0.0)
    play(oracle, [(2, 4)], *random_inputs(0, 6, heads=1, group=1))
    assert [h[0] for h in oracle.history[3:]] == [[0, 1, 2, 3], [0, 1, 4, 3], [0, 1, 4, 5]]


@pytest.mark.parametrize(("group", "kept"), [(1, 2), (2, 2)])
def test_snapkv_pools_with_zeros_at_the_edges(group, kept):
    """All weights equal: of the four earlier tokens 0 and 3 have three neighbours, 1 and 2 four, and 1 is the lower."""
    oracle = SnapKV(heads=1, group=group, budget=33)
    query, key, value = random_inputs(0, 36, heads=1, group=group)
    oracle.prompt(0 * query, key, value)
    assert oracle.held() == [[kept, *range(4, 36)]]


@pytest.mark.parametrize("seed", range(5))
def test_snapkv_is_its_formula_in_every_turn(seed):
    """As tensors: softmax of all, the turn's last 32 queries, avg_pool1d, topk."""
    query, key, value = random_inputs(seed, 70)
    oracle = SnapKV(**SHAPE, budget=40)
    oracle.prompt(query[:50], key[:50], value[:50])
    expected = [snapkv_kept(query[:50, 2 * h : 2 * h + 2], key[:50, h], list(range(50)), budget=40) for h in range(2)]
    assert oracle.held() == expected
    for t in range(50, 52):
        oracle.decode(query[t], key[t], value[t])
    oracle.prompt(query[52:], key[52:], value[52:])
    held = [[*kept, *range(50, 70)] for kept in expected]
    assert oracle.held() == [
        snapkv_kept(query[52:, 2 * h : 2 * h + 2], key[held[h], h], held[h], budget=40) for h in range(2)
    ]


def snapkv_kept(query, key, held, *, budget):
    """query: [n, G, D], of the last n of those held; key: [held, D]."""
    n, count = len(query), len(key)
    scores = torch.einsum("ngd,kd->gnk", query, key) * key.shape[-1] ** -0.5
    causal = torch.arange(count) <= torch.arange(count - n, count)[:, None]
    sums = scores.masked_fill(~causal, -torch.inf).softmax(-1)[:, -32:, :-32].sum((0, 1))
    pooled = torch.nn.functional.avg_pool1d(sums[None], 5, stride=1, padding=2)[0]
    kept = pooled.topk(budget - 32).indices.sort().values.tolist()
    return [held[i] for i in kept] + held[-32:]


def test_quest_by_hand():
    keys = [[-7, 0], [-7, 0], [3, 0], [0, -3], [2, -2], [2, -2], [2.4, -2.4], [0, 0], [-9, 9]]
    key = torch.tensor(keys, dtype=torch.float64)[:, None]
    query = torch.tensor([[1, -1], [-1, 0]], dtype=torch.float64)
    # Bounds under (1, -1), pages of two: -7, 3 + 3 (though each key scores 3), 4, 2.4 + 2.4.
    # Under (-1, 0): 7, 0, -2, 0. The maxima: 7, 6, 4, 4.8. With the newest page: the first two.
    read = [0, 1, 2, 3, 8]
    oracle = Quest(heads=1, group=2, scale=1.0, budget=2, page=2, layer=2)
    oracle.prompt(query.expand(8, 2, 2), key[:8], key[:8])
    out = oracle.decode(query, key[8], key[8])
    same(out, (query @ key[read, 0].T).softmax(-1) @ key[read, 0])
    assert oracle.reads == [[5]] and oracle.bound_reads == [[5]] and oracle.peak == [9]
    # A budget of 7 tokens is four pages: 3 is the next.
    oracle = Quest(heads=1, group=2, scale=1.0, budget=7, page=2, layer=2)
    oracle.prompt(query.expand(8, 2, 2), key[:8], key[:8])
    oracle.decode(query, key[8], key[8])
    assert oracle.reads == [[7]]


def test_quest_reads_prompts_densely():
    inputs = random_inputs(0, 12)
    oracle = Quest(**SHAPE, budget=1, page=1, layer=2)
    assert torch.equal(oracle.prompt(*inputs), Dense(**SHAPE).prompt(*inputs))
    assert oracle.bound_reads == []


def test_quest_takes_the_lower_of_equal_pages():
    oracle = Quest(**ONE, budget=1, page=1, layer=2)
    value = column(*range(5))
    oracle.prompt(0 * value[:4], 0 * value[:4], value[:4])
    assert oracle.decode(0 * value[4], 0 * value[4], value[4]).item() == pytest.approx((0 + 1 + 4) / 3)


def test_dms_with_quest_reads_the_page_written_to_and_bounds_what_lies_there_now():
    oracle = DMSQuest(**ONE, window=4, budget=1, page=1, layer=2)
    key = column(9, 1, 2, 3, 0, 5)
    marks = torch.tensor([True, False, False, False, False, False])[:, None]
    out = play(oracle, [(4, 2)], key * 0 + 1, key, key, marks=marks)
    assert oracle.history[4:] == [[[4, 1, 2, 3]], [[4, 1, 2, 3, 5]]]
    # 4 lies where 0 was: that page is read though its bound is the least now, beside 3 and 2. Then 5, 3 and 2.
    for t, read in ((4, (0, 2, 3)), (5, (2, 3, 5))):
        held = torch.tensor(read, dtype=torch.float64)
        same(out[t].flatten(), (held.softmax(0) @ held)[None])
    assert oracle.reads == [[3], [3]] and oracle.bound_reads == [[4], [5]]


def test_dmc_by_hand():
    oracle = DMC(**ONE)
    merge = torch.tensor([[True], [True], [False], [True]])
    weights = torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    out = play(
        oracle, [(2, 2)], column(0, 0, 0, 0), column(1, 4, 2, 6), column(0, 3, 4, 8), merge=merge, weights=weights
    )
    # (1 x 1 + 2 x 4) / 3 = 3; 2, then (1 x 2 + 3 x 6) / 4 = 5. Values: 2; 4, then 7. Equal weights under the query 0.
    assert [slot.key.item() for slot in oracle.slots[0]] == [3, 5]
    assert [slot.weight for slot in oracle.slots[0]] == [3, 4]
    same(out.flatten(), torch.tensor([0, 2, 3, 4.5], dtype=torch.float64))
    assert [h[0] for h in oracle.history] == [[0], [0], [0, 2], [0, 2]] and oracle.reads == [[2], [2]]
