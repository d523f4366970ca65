"""draw as one Triton kernel, a program a row: no sort, and nothing is written but the token.

A logit's key is its bits as an integer in the same order (those bits alone that its type has: 16 for bfloat16). A
filter is then a threshold on keys, found by search: each pass over the row sums what lies at or above three keys (a
count, or a mass in float32) and quarters the interval. Of the tokens whose key is the threshold itself the first few
are kept. The sums have a fixed order, so the result is deterministic.
"""

# triton.jit's types know no launch options, and no tuple that a kernel returns.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.noise_triton import mix, unit

BLOCK, WARPS = 8192, 16
LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Of the 32 bits of a float32, how many are zero in each type."""

FREE = ["seed", "sample", "position", "temperature", "min_p", "top_k", "top_p", "stride", "vocab"]
"""What the code does not depend on: of one row, the parameters lie wherever their batch did."""

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_NOTHING: tl.constexpr = tl.constexpr(-2139095041)
"""The key of minus infinity."""


def draw(
    logits: Tensor,
    noise: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None,
    *,
    block: int = BLOCK,
) -> Tensor:
    """See api.draw. block: tokens that a program looks at together."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _draw[(len(logits),)](
            logits, *(x.contiguous() for x in noise), temperature.contiguous(),
            *(x.contiguous() for x in filters or (temperature, noise[0], temperature)), tokens,
            logits.stride(0), logits.shape[1],
            FILTERS=filters is not None, SHIFT=LOW_BITS[logits.dtype], BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return tokens


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """int32: in the order of float32 x, equal for equal numbers."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # minus zero is zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _number(key, SHIFT: tl.constexpr):
    """float32: the number with this key, int64."""
    whole = ((key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)).to(tl.int32)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(logits, first, vocab, BLOCK: tl.constexpr):
    """float32 [BLOCK] from token `first` on, minus infinity beyond the vocabulary."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(logits + at, mask=at < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _largest(logits, vocab, BLOCK: tl.constexpr):
    """The largest logit and the first token that has it."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = lane
    for first in range(0, vocab, BLOCK):
        x = _load(logits, first, vocab, BLOCK)
        at = tl.where(x > best, first + lane, at)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, at, vocab), 0)


@triton.jit
def _above(logits, vocab, best, inverse, a, b, c, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """float32: the mass (or count) of the tokens whose key is at least a, b and c (int64)."""
    a, b, c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
    over_a = tl.zeros([BLOCK], tl.float32)
    over_b = tl.zeros([BLOCK], tl.float32)
    over_c = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        x = _load(logits, first, vocab, BLOCK)
        key = _key(x, SHIFT)
        if MASS:
            each = tl.exp2((x - best) * inverse)
        else:
            each = tl.full([BLOCK], 1.0, tl.float32)
        over_a += tl.where(key >= a, each, 0.0)
        over_b += tl.where(key >= b, each, 0.0)
        over_c += tl.where(key >= c, each, 0.0)
    return tl.sum(over_a, 0), tl.sum(over_b, 0), tl.sum(over_c, 0)


@triton.jit
def _search(
    logits, vocab, best, inverse, low, high, wanted,
    MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key in low .. high (int64) with at least `wanted` at or above it; low if there is none."""
    while low < high:
        quarter = (high - low + 3) // 4
        a = low + quarter
        b, c = tl.minimum(a + quarter, high), tl.minimum(a + 2 * quarter, high)
        over_a, over_b, over_c = _above(logits, vocab, best, inverse, a, b, c, MASS, SHIFT, BLOCK)
        if over_c >= wanted:
            low = c
        elif over_b >= wanted:
            low, high = b, c - 1
        elif over_a >= wanted:
            low, high = a, b - 1
        else:
            high = a - 1
    return low


@triton.jit
def _last_equal(logits, vocab, threshold, equals, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The token at which `equals` tokens with the key `threshold` (int64) have come, or the last of the vocabulary."""
    threshold = threshold.to(tl.int32)
    first, seen = 0, 0
    here = tl.sum((_key(_load(logits, first, vocab, BLOCK), SHIFT) == threshold).to(tl.int32), 0)
    while (seen + here < equals) & (first + BLOCK < vocab):
        seen += here
        first += BLOCK
        here = tl.sum((_key(_load(logits, first, vocab, BLOCK), SHIFT) == threshold).to(tl.int32), 0)
    equal = (_key(_load(logits, first, vocab, BLOCK), SHIFT) == threshold).to(tl.int32)
    reached = (seen + tl.cumsum(equal, 0) >= equals) & (equal > 0)
    return tl.min(tl.where(reached, first + tl.arange(0, BLOCK), vocab), 0)


@triton.jit
def _kept(logits, first, vocab, best, inverse, threshold, last, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK]: the mass of each token above the threshold (int32), or at it and not beyond `last`; else 0."""
    x = _load(logits, first, vocab, BLOCK)
    key = _key(x, SHIFT)
    kept = (key > threshold) | ((key == threshold) & (first + tl.arange(0, BLOCK) <= last))
    return tl.where(kept, tl.exp2((x - best) * inverse), 0.0)


@triton.jit
def _pick(
    logits, vocab, best, at_best, inverse, threshold, last, u, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token at which the cumulative mass of the kept exceeds u (float64) times the whole."""
    threshold = threshold.to(tl.int32)
    total = tl.sum(_kept(logits, 0, vocab, best, inverse, threshold, last, SHIFT, BLOCK), 0).to(tl.float64)
    for begin in range(BLOCK, vocab, BLOCK):
        total += tl.sum(_kept(logits, begin, vocab, best, inverse, threshold, last, SHIFT, BLOCK), 0).to(tl.float64)
    point = u * total
    first = 0
    here = tl.sum(_kept(logits, first, vocab, best, inverse, threshold, last, SHIFT, BLOCK), 0).to(tl.float64)
    before = here - here
    while (before + here <= point) & (first + BLOCK < vocab):
        before += here
        first += BLOCK
        here = tl.sum(_kept(logits, first, vocab, best, inverse, threshold, last, SHIFT, BLOCK), 0).to(tl.float64)
    mass = _kept(logits, first, vocab, best, inverse, threshold, last, SHIFT, BLOCK)
    token = first + tl.arange(0, BLOCK)
    # A parallel sum need not grow from token to token: only one that has mass is taken.
    over = (tl.cumsum(mass, 0) > (point - before).to(tl.float32)) & (mass > 0)
    found = tl.min(tl.where(over, token, vocab), 0)
    latest = tl.max(tl.where(mass > 0, token, -1), 0)  # where rounding leaves nothing over
    return tl.where(found < vocab, found, tl.where(latest >= 0, latest, at_best))


@triton.jit(do_not_specialize=FREE)
def _draw(
    logits, seed, sample, position, temperature, min_p, top_k, top_p, tokens, stride, vocab,
    FILTERS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    best, token = _largest(logits, vocab, BLOCK)
    heat = tl.load(temperature + row)
    if heat > 0:
        inverse = _LOG2_E / heat
        low = tl.full([], (_NOTHING >> SHIFT) + 1, tl.int64)
        last = vocab
        if FILTERS:
            high = _key(best, SHIFT).to(tl.int64)
            share, count, nucleus = tl.load(min_p + row), tl.load(top_k + row), tl.load(top_p + row)
            if share > 0:
                bound = best + heat * tl.log(share)
                low = tl.maximum(low, _key(bound, SHIFT).to(tl.int64))
                low = tl.minimum(tl.where(_number(low, SHIFT) < bound, low + 1, low), high)
            floor, equals = low, vocab
            if (count > 0) & (count < vocab):
                wanted = count.to(tl.float32)
                low = _search(logits, vocab, best, inverse, low, high, wanted, False, SHIFT, BLOCK)
                more, all_, _ = _above(logits, vocab, best, inverse, low + 1, low, low, False, SHIFT, BLOCK)
                floor, equals = low, tl.where(all_ >= wanted, count.to(tl.int32) - more.to(tl.int32), vocab)
            if nucleus < 1:
                more, all_, _ = _above(logits, vocab, best, inverse, low + 1, low, low, True, SHIFT, BLOCK)
                each = tl.exp2((_number(low, SHIFT) - best) * inverse)
                total = tl.minimum(more + equals.to(tl.float32) * each, all_)
                # Tokens below this weigh less than what may be left out, all together.
                least = best + heat * tl.log(0.5 * (1 - nucleus) * total / vocab)
                low = tl.minimum(tl.maximum(low, _key(least, SHIFT).to(tl.int64)), high)
                wanted = nucleus * total
                low = _search(logits, vocab, best, inverse, low, high, wanted, True, SHIFT, BLOCK)
                more, _, _ = _above(logits, vocab, best, inverse, low + 1, low, low, True, SHIFT, BLOCK)
                each = tl.exp2((_number(low, SHIFT) - best) * inverse)
                few = tl.maximum(tl.minimum(tl.ceil((wanted - more) / tl.maximum(each, 1e-37)), vocab), 1).to(tl.int32)
                equals = tl.where(low == floor, tl.minimum(few, equals), few)
            if equals < vocab:
                last = _last_equal(logits, vocab, low, equals, SHIFT, BLOCK)
        u = unit(mix(mix(mix(tl.load(seed + row)) + tl.load(sample + row)) + tl.load(position + row)))
        token = _pick(logits, vocab, best, token, inverse, low, last, u, SHIFT, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))
