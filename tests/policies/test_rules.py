"""Each policy's rule against a naive list model, step by step, on a real cache whose keys name their tokens."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekv
from helpers import Run, attend, check_pages, tiny_model
from sparsekv import SparseCache
from sparsekv.attend import page_bytes
from sparsekv.dms import EvictionHead
from sparsekv.modeling.attach import attachment_of
from sparsekv.ops.layout import Batch, LinearMarks
from sparsekv.policies import Policy, make_policy, policy_names
from sparsekv.policies.base import Step
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.streaming import SlidingWindowPolicy, StreamingPolicy

HEADS, GROUP, ROWS = 2, 2, 2


def dms(window: int, lag: int = 0) -> DMSPolicy:
    """A DMS policy whose logits are the hidden state."""
    return DMSPolicy([lambda hidden: hidden], window=window, lag=lag)


def test_golden_example():
    """design.md, section 2: w = 2, retention 0.2 0.9 0.3 0.8 0.1 0.95 for A..F; e = 1 where retention < 0.5."""
    retention = torch.tensor([0.2, 0.9, 0.3, 0.8, 0.1, 0.95])
    logits = torch.logit(1 - retention)
    run = Run(policy=dms(2), heads=1)
    steps = []
    for z in logits:
        run.step([1], hidden=z.view(1, 1), query=torch.zeros(1, 1, 2).double())
        steps.append("".join("ABCDEF"[int(t)] for t in run.held()))
    assert steps == ["A", "AB", "BC", "BCD", "BDE", "BDEF"]


def test_golden_example_in_one_prefill():
    run = Run(policy=dms(2), heads=1)
    hidden = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
    run.step([6], hidden=hidden, query=torch.zeros(6, 1, 2).double())
    assert run.held() == [1.0, 3.0, 4.0, 5.0]  # B D E F


# The rules as list models: (held tokens, new token, marks so far) -> held tokens


def naive_dense(held, t, z):
    return [*held, t]


def naive_dms(window, lag):
    def rule(held, t, z):
        old = t - window
        marked = old >= 0 and old + lag <= t and z[old + lag] > 0
        return [k for k in held if k != old or not marked] + [t]

    return rule


def naive_streaming(budget, sinks):
    def rule(held, t, z):
        held = [*held, t]
        if len(held) > budget:
            held.remove(next(k for k in held if k >= sinks))
        return held

    return rule


RULES: dict[str, tuple[Callable[[], Policy], Callable]] = {
    "dense": (Policy, naive_dense),
    "dms": (lambda: dms(3), naive_dms(3, 0)),
    "dms of window 1": (lambda: dms(1), naive_dms(1, 0)),
    "dms of lag 1": (lambda: dms(3, lag=1), naive_dms(3, 1)),
    "dms of lag 1 and window 1": (lambda: dms(1, lag=1), naive_dms(1, 1)),
    "streaming": (lambda: StreamingPolicy(budget=5, sinks=2), naive_streaming(5, 2)),
    "streaming without sinks": (lambda: StreamingPolicy(budget=3, sinks=0), naive_streaming(3, 0)),
    "sliding window": (lambda: SlidingWindowPolicy(4), naive_streaming(4, 0)),
}
chunks = st.lists(st.tuples(*[st.integers(0, 7)] * ROWS).filter(any), min_size=1, max_size=8)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40)
@given(chunks=chunks, decoded=st.integers(0, 6), page_size=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_policy_follows_its_rule(name, chunks, decoded, page_size, seed):
    """Steps of any size leave what the list model holds, and every query reads exactly that."""
    make, rule = RULES[name]
    run = Run(policy=make(), rows=ROWS, heads=HEADS, group=GROUP, page_size=page_size)
    generator = torch.Generator().manual_seed(seed)
    held = [[[] for _ in range(HEADS)] for _ in range(ROWS)]
    z = [[[] for _ in range(HEADS)] for _ in range(ROWS)]
    for counts in [*map(list, chunks), *[[1] * ROWS] * decoded]:
        total = sum(counts)
        hidden = torch.randn(total, HEADS, generator=generator)
        query = torch.randn(total, HEADS * GROUP, 2, generator=generator).double()
        out = run.step(counts, hidden=hidden, query=query)
        index = 0
        for row, count in enumerate(counts):
            for _ in range(count):
                for head in range(HEADS):
                    z[row][head].append(float(hidden[index, head]))
                    held[row][head] = rule(held[row][head], len(z[row][head]) - 1, z[row][head])
                    for g in (head * GROUP, head * GROUP + 1):
                        expected = attend(query[index, g], held[row][head])
                        assert torch.allclose(out[index, g], expected, rtol=1e-10, atol=1e-10)
                index += 1
        for row in range(ROWS):
            for head in range(HEADS):
                assert run.held(row, head) == sorted(held[row][head])
    check_pages(run.cache)


def test_known_names_build_and_unknown_ones_are_refused():
    assert policy_names() == sorted({"dense", "dms", "streaming"} | set(policy_names()))
    assert make_policy("dense").name == "dense"
    assert make_policy("streaming", budget=9, sinks=1).window(0) == 8
    with pytest.raises(ValueError, match="unknown policy 'lru'; use one of dense, dmc, dms"):
        make_policy("lru")
    with pytest.raises(ValueError, match="policy 'streaming' got an unexpected keyword argument 'bugdet'"):
        make_policy("streaming", bugdet=9)
    with pytest.raises(ValueError, match="missing 1 required keyword-only argument: 'budget'"):
        make_policy("streaming")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StreamingPolicy(budget=4, sinks=4), "budget 4 leaves no recent window beside 4 sinks; use at least 5"),
        (lambda: StreamingPolicy(budget=4, sinks=-1), "sinks is -1"),
        (lambda: dms(0), "window is 0; it counts the current token, so use at least 1"),
        (lambda: dms(4, lag=2), "lag is 2; the logit of token k . lag decides token k: use 0, 1 or the window"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_offset_is_added_in_chunks_and_in_steps():
    """Logits of -1 and 2: an offset of 1.5 marks both, one of -2.5 neither, as the decode step's own numbers say."""
    head = EvictionHead(1, 1)
    with torch.no_grad():
        head.weight.fill_(1)
        head.bias.zero_()
    policy = DMSPolicy([head], window=2)
    hidden = torch.tensor([[-1.0], [2.0]])
    batch = Batch(rows=torch.arange(2), starts=torch.arange(3, dtype=torch.int32), longest=1)
    nothing = torch.zeros(2, 1, 2)
    tensors = {"query": nothing, "key": nothing, "value": nothing, "seen": torch.zeros(2, dtype=torch.int32)}
    step = Step(layer=0, batch=batch, hidden=hidden, scale=1.0, most=1, **tensors)
    for offset, marks in ((1.5, [True, True]), (0.0, [False, True]), (-2.5, [False, False])):
        policy.offset = offset
        later = policy.decode_marks(step)
        assert isinstance(later, LinearMarks)
        assert policy.marks(step)[:, 0].tolist() == later.marks()[:, 0].tolist() == marks


@pytest.mark.parametrize("name", ["tova", "h2o", "random"])
def test_a_head_at_its_budget_needs_no_page(name):
    """A pool without a spare page goes on."""
    model = tiny_model(dtype=torch.float64)
    sparsekv.attach(model, policy=name, budget=16)
    attachment = attachment_of(model)
    policies = [attached.policy for attached in attachment.layers]
    each = page_bytes(policies, attachment.head_shape(torch.float64), page_size=8)
    cache = SparseCache(model, page_size=8, kv_memory=2 * len(policies) * attachment.kv_heads * each)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        for token in range(5):
            model(input_ids=torch.tensor([[20 + token]]), past_key_values=cache)
    assert cache.stats().tokens_held == 16
