"""The protocol fits every row of the table in policies/base.py: tiny policies, each against a naive model.

A naive model is a function of one sequence's history alone, so the same check holds for rows that were forked: a policy
whose state does not follow its rows, or whose forks share a page that one of them rewrites, fails.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from helpers import Run, check_pages
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import Batch
from sparsekv.ops.place import place
from sparsekv.policies import Policy

HEADS, GROUP, SCALE = 2, 2, 0.1
BUDGET, PROTECTED, RECENT, SNAP, TOP_PAGES = 5, 2, 2, 2, 2


def tensor_of(step, pages, name, *shape):
    """The policy's own tensor [R, ...], zero at first."""
    if name not in step.state:
        step.state[name] = torch.zeros(pages.lengths.shape[0], *shape, dtype=torch.float64)
    return step.state[name]


class Budgeted(Policy):
    def appends(self, pages):
        return pages.lengths < BUDGET


class Tova(Budgeted):
    needs_weights = True

    def observe(self, step, pages, weights):
        tensor_of(step, pages, "last", 99)[step.batch.rows, : weights.shape[-1]] = weights.mean(1)

    def slots(self, step, pages):
        least = tensor_of(step, pages, "last", 99)[step.batch.rows, :BUDGET].argmin(-1)
        full = pages.lengths[step.batch.rows] >= BUDGET
        return torch.where(full, least[:, None], -1).int()

    def prune(self, step, pages):
        rows, last = step.batch.rows, step.batch.starts[1:].long() - 1
        weights = decode(pages, rows, step.query[last], scale=SCALE, return_weights=True).weights
        self.observe(step, pages, weights)
        if weights.shape[-1] <= BUDGET:
            return None
        scores = step.state["last"][rows]
        kept = scores.topk(BUDGET).indices.sort().values
        step.state["last"][rows, :BUDGET] = scores.gather(1, kept)
        keep = torch.zeros(*weights.shape[::2], dtype=torch.bool).scatter(1, kept, True)
        return keep[:, None].expand(-1, HEADS, -1)


class Random(Budgeted):
    """The least of a hash stands for chance; the prompt's first tokens and the recent ones are safe."""

    def slots(self, step, pages):
        rows = step.batch.rows
        born = tensor_of(step, pages, "born", HEADS, 99)
        length, now = pages.lengths[rows], step.seen[:, None, None]
        safe = (born[rows] < PROTECTED) | (born[rows] > now - RECENT)
        chosen = chance(born[rows], now).masked_fill(safe, torch.inf)[..., :BUDGET].argmin(-1)
        slots = torch.where(length >= BUDGET, chosen, -1)
        written = torch.where(slots >= 0, slots, length).long()
        born[rows[:, None], torch.arange(HEADS), written] = step.seen[:, None].double()
        return slots.int()

    def prune(self, step, pages):
        tensor_of(step, pages, "born", HEADS, 99)[...] = torch.arange(99)


def chance(born, now):
    return (born * 7919 + now * 104729) % 31 + born / 100


class Snap(Policy):
    def prune(self, step, pages):
        starts = step.batch.starts.tolist()
        keep = torch.zeros(len(starts) - 1, HEADS, int(pages.lengths.max()), dtype=torch.bool)
        for b, (start, end) in enumerate(pairwise(starts)):
            for h in range(HEADS):
                query = step.query[start:end, h * GROUP : (h + 1) * GROUP]
                keep[b, h, snap_kept(query, step.key[start:end, h])] = True
        return keep


def snap_kept(query, key):
    """The prompt's last tokens, and those that they attend to most."""
    n = len(key)
    scores = torch.einsum("qgd,kd->gqk", query[-SNAP:], key) * SCALE
    causal = torch.arange(n - SNAP, n)[:, None] >= torch.arange(n)
    weight = scores.masked_fill(~causal, -torch.inf).softmax(-1).sum((0, 1))[: n - SNAP]
    return [*weight.topk(min(BUDGET - SNAP, n - SNAP)).indices.tolist(), *range(n - SNAP, n)]


class Quest(Policy):
    def read(self, step, pages):
        table, lengths, size = pages.pages.clone(), pages.lengths.clone(), pages.page_size
        for b, row in enumerate(step.batch.rows.tolist()):
            for h in range(HEADS):
                length = int(lengths[row, h])
                count = -(-length // size)
                key = pages.kv[table[row, h, :count].long(), 0].clone()
                key[-1, (length - 1) % size + 1 :] = key[-1, 0]
                chosen = quest_pages(step.query[b, h * GROUP : (h + 1) * GROUP], key)
                table[row, h, : len(chosen)] = pages.pages[row, h, chosen]
                lengths[row, h] = (len(chosen) - 1) * size + (length - 1) % size + 1
        return replace(pages, pages=table, lengths=lengths)


def quest_pages(query, key):
    """query: [G, D]; key: [pages, C, D]. The best pages by their bound, the newest among them and last."""
    low, high = key.amin(1), key.amax(1)
    bound = torch.maximum(query[:, None] * low, query[:, None] * high).sum((0, 2))
    best = bound[:-1].topk(min(TOP_PAGES - 1, len(key) - 1)).indices.tolist()
    return [*sorted(best), len(key) - 1]


class Dmc(Policy):
    """Merges a token into the last slot where its hidden state is positive."""

    def place(self, step, pages, marks):
        starts, counts = step.batch.starts[:-1].long(), step.batch.counts
        for i in range(int(counts.max())):
            chosen = counts > i
            token, rows = starts[chosen] + i, step.batch.rows[chosen]
            batch = Batch(rows=rows, starts=torch.arange(len(rows) + 1, dtype=torch.int32), longest=1)
            slots = torch.full((len(rows), HEADS), -1, dtype=torch.int32)
            key, count = step.key[token].clone(), tensor_of(step, pages, "count", HEADS)
            for b, row in enumerate(rows.tolist()):
                for h in range(HEADS):
                    last = int(pages.lengths[row, h]) - 1
                    merge = last >= 0 and step.hidden[token[b], h] > 0
                    count[row, h] = count[row, h] + 1 if merge else 1
                    if merge:
                        page = pages.pages[row, h, last // pages.page_size]
                        old = pages.kv[page, 0, last % pages.page_size]
                        key[b, h] = old + (key[b, h] - old) / count[row, h]
                        slots[b, h] = last
            place(pages, batch, key, key, slots=slots)


# Naive models: (hidden [n, H], query [n, H * G, 2], prompt length, head) -> (what is held, what the last query reads)


def name(t):
    return torch.tensor([t, t * t], dtype=torch.float64)


def head_of(query, t, h):
    return query[t, h * GROUP : (h + 1) * GROUP]


def weights_of(query, held):
    return (query @ torch.stack([name(t) for t in held]).T * SCALE).softmax(-1)


def naive_tova(hidden, query, prompt, head):
    held, last = list(range(prompt)), torch.empty(0)
    for t in range(prompt - 1, len(query)):
        if t >= prompt:
            if len(held) >= BUDGET:
                held.pop(int(last.argmin()))
            held.append(t)
        last = weights_of(query[t], held).mean(0)  # over all heads of the layer: they hold the same tokens
        if len(held) > BUDGET:
            kept = last.topk(BUDGET).indices.sort().values
            held, last = [held[i] for i in kept], last[kept]
    return held, held


def naive_random(hidden, query, prompt, head):
    held = list(range(prompt))
    for t in range(prompt, len(query)):
        if len(held) >= BUDGET:
            held.remove(min((k for k in held if PROTECTED <= k <= t - RECENT), key=lambda k: chance(k, t)))
        held.append(t)
    return held, held


def naive_snap(hidden, query, prompt, head):
    own = torch.stack([head_of(query, t, head) for t in range(prompt)])
    held = snap_kept(own, torch.stack([name(t) for t in range(prompt)])) + list(range(prompt, len(query)))
    return held, held


def naive_quest(hidden, query, prompt, head):
    n = len(query)
    groups = [list(range(i, min(i + 2, n))) for i in range(0, n, 2)]
    key = torch.stack([torch.stack([name(g[0]), name(g[-1])]) for g in groups])
    read = [t for page in quest_pages(head_of(query, n - 1, head), key) for t in groups[page]]
    return list(range(n)), read


def naive_dmc(hidden, query, prompt, head):
    merged = []
    for t in range(len(query)):
        if merged and hidden[t, head] > 0:
            merged[-1].append(t)
        else:
            merged.append([t])
    means = [torch.stack([name(t) for t in run]).mean(0) for run in merged]
    return [float(m[0]) for m in means], means


METHODS = {
    "TOVA": (Tova, naive_tova, 8),
    "TOVA below its budget": (Tova, naive_tova, 3),
    "random": (Random, naive_random, 4),
    "SnapKV": (Snap, naive_snap, 9),
    "Quest": (Quest, naive_quest, 7),
    "DMC": (Dmc, naive_dmc, 6),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_method_follows_its_naive_model_alone_and_forked(method, seed):
    make, naive, prompt = METHODS[method]
    run = Run(policy=make(), rows=2, heads=HEADS, group=GROUP)
    generator = torch.Generator().manual_seed(seed)
    history = [(torch.empty(0, HEADS), torch.empty(0, HEADS * GROUP, 2).double()) for _ in range(2)]

    def step(count):
        drawn = [
            (
                torch.randn(count, HEADS, generator=generator),
                torch.randn(count, HEADS * GROUP, 2, generator=generator).double(),
            )
            for _ in history
        ]
        history[:] = [
            (torch.cat([h, new_h]), torch.cat([q, new_q]))
            for (h, q), (new_h, new_q) in zip(history, drawn, strict=True)
        ]
        hidden, query = (torch.cat(x) for x in zip(*drawn, strict=True))
        out = run.step([count] * len(history), hidden=hidden, query=query)
        reads = 0
        for row, (h, q) in enumerate(history):
            for head in range(HEADS):
                held, read = naive(h, q, prompt, head)
                assert run.held(row, head) == pytest.approx(sorted(held))
                if count == 1:
                    kv = torch.stack([x if torch.is_tensor(x) else name(x) for x in read])
                    expected = (head_of(q, -1, head) @ kv.T * SCALE).softmax(-1) @ kv
                    assert torch.allclose(head_of(out, row, head), expected)
                    reads += len(read)
        assert count > 1 or run.reads == reads
        check_pages(run.cache)

    step(prompt)
    for _ in range(5):
        step(1)
    run.cache.select(torch.tensor([1, 0, 1]))
    history[:] = [history[i] for i in (1, 0, 1)]
    for _ in range(6):
        step(1)


def test_only_policies_that_rewrite_slots_keep_forks_from_sharing():
    assert [make().rewrites for make in (Tova, Random, Snap, Quest, Dmc)] == [True, True, True, False, True]
    assert not Policy().rewrites


@pytest.mark.parametrize(("make", "shared"), [(Policy, 2), (Tova, 0)])
def test_forks_share_full_pages_unless_rewritten(make, shared):
    run = Run(policy=make(), rows=1, heads=1)
    run.step([5], hidden=torch.zeros(5, 1), query=torch.zeros(5, 1, 2).double())
    full = run.cache.pool.pages_in_use
    run.cache.select(torch.tensor([0, 0]))
    assert run.cache.pool.pages_in_use == 2 * full - shared
