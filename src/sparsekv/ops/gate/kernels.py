"""The kernels of gate.triton, which says what each computes.

A block meets its tiles in two loops. Full tiles, whole past the window and within one document with no causal edge, add
the gate without a comparison. Edges, on both sides of those, apply the rule in full.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # the first running maximum: finite, so that a row that sees nothing yet weighs 0, not NaN
FIRST, RUN, LAST, UNTIL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # planes of spans; 0: ids
RUN_TIME = ["length", "heads", "rows", "window", "scale", "factor"]


@triton.jit
def _tile(base, stride, low, index, length, D: tl.constexpr, DP: tl.constexpr, EDGE: tl.constexpr):
    """Tokens low + index: [n, DP], 0 beyond D and, at an edge, beyond length."""
    dim = tl.arange(0, DP)[None, :]
    at = base + low * stride.to(tl.int64) + (index[:, None] * stride + dim)
    if EDGE:
        return tl.load(at, mask=(low + index < length)[:, None] & (dim < D), other=0.0)
    elif DP != D:
        return tl.load(at, mask=dim < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _numbers(base, low, index, length, other, EDGE: tl.constexpr):
    """One number a token: [n], `other` beyond length."""
    if EDGE:
        return tl.load(base + low + index, mask=low + index < length, other=other)
    else:
        return tl.load(base + low + index)


@triton.jit
def _store(base, stride, low, index, length, value, D: tl.constexpr, DP: tl.constexpr):
    dim = tl.arange(0, DP)[None, :]
    at = base + low * stride.to(tl.int64) + (index[:, None] * stride + dim)
    tl.store(at, value.to(base.dtype.element_ty), mask=(low + index < length)[:, None] & (dim < D))


@triton.jit
def _head(base, stride, row, head):
    """Where a sequence's head starts."""
    return base + row * stride[0] + head.to(tl.int64) * stride[1]


@triton.jit
def _plane(spans, plane, rows, row, length):
    return spans + (plane * rows + row) * length


@triton.jit
def _score(s, gate, age, same, window, EDGE: tl.constexpr):
    """Scores in base 2 under the rule; gate, age and same broadcast to s, each None where there is none."""
    if EDGE:
        if gate is not None:
            s += tl.where(age >= window, gate, 0.0)
        seen = age >= 0
        if same is not None:
            seen &= same
        return tl.where(seen, s, -float("inf"))
    elif gate is not None:
        return s + gate
    else:
        return s


@triton.jit
def _keys_of(spans, first, length, window, rows, row, M: tl.constexpr, N: tl.constexpr):
    """(start, low, high, end) of the keys that a block of queries meets: full tiles from low to high, edges before and
    after. All but the end are multiples of N. window: 0 without a gate."""
    end = tl.minimum(first + M, length)
    start = first * 0
    low = start
    if spans is not None:
        query = tl.minimum(first + tl.arange(0, M), length - 1)
        start = tl.min(tl.load(_plane(spans, FIRST, rows, row, length) + query), 0) // N * N
        low = tl.cdiv(tl.max(tl.load(_plane(spans, RUN, rows, row, length) + query), 0), N) * N
    high = tl.maximum(first + 1 - window, 0) // N * N
    high = tl.where(high > low, high, start)
    return start, tl.minimum(low, high), high, end


@triton.jit
def _queries_of(spans, first, length, window, rows, row, M: tl.constexpr, N: tl.constexpr):
    """(start, low, high, end) of the queries that see a block of keys, as in _keys_of."""
    start = first // M * M
    low = tl.cdiv(first + N - 1 + window, M) * M
    high = length
    end = length
    if spans is not None:
        key = tl.minimum(first + tl.arange(0, N), length - 1)
        end = tl.max(tl.load(_plane(spans, LAST, rows, row, length) + key), 0) + 1
        high = tl.min(tl.load(_plane(spans, UNTIL, rows, row, length) + key), 0) + 1
    high = high // M * M
    high = tl.where(high > low, high, start)
    return start, tl.minimum(low, high), high, end


@triton.jit
def _scores_of_keys(lo, tile_q, mine, first, k, k_stride, keep, documents, length, window, scale,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """([M, N] scores of a block of queries and a tile of keys, the keys)."""
    key = tl.arange(0, N)
    tile_k = _tile(k, k_stride, lo, key, length, D, DP, EDGE).to(DOT)
    s = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee") * scale
    gate, same = None, None
    if keep is not None:
        gate = (_numbers(keep, lo, key, length, 0.0, EDGE) * LOG2E)[None, :]
    if EDGE and documents is not None:
        same = mine[:, None] == _numbers(documents, lo, key, length, 0, EDGE)[None, :]
    age = (first + tl.arange(0, M))[:, None] - (lo + key)[None, :]
    return _score(s, gate, age, same, window, EDGE), tile_k


@triton.jit
def _forward_step(state, lo, block, v, v_stride,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys."""
    acc, total, top = state
    tile_q, mine, first, k, k_stride, keep, documents, length, window, scale = block
    scores = _scores_of_keys(
        lo, tile_q, mine, first, k, k_stride, keep, documents, length, window, scale, D, DP, M, N, DOT, EDGE
    )
    s = scores[0]
    tile_v = _tile(v, v_stride, lo, tl.arange(0, N), length, D, DP, EDGE).to(DOT)
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(p.to(DOT), tile_v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@triton.jit(do_not_specialize=RUN_TIME)
def forward(
    out, lse, q, k, v, keep, spans, stride, length, heads, rows, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # the longest first: they end together
    at = tl.arange(0, M)
    bounds = _keys_of(spans, first, length, window, rows, row, M, N)
    start, low, high, end = bounds
    if keep is not None:
        keep += (row * (heads // GROUP) + head // GROUP) * length
    documents, mine = spans, None
    if spans is not None:
        documents = _plane(spans, 0, rows, row, length)
        mine = _numbers(documents, first, at, length, 0, True)
    tile_q = _tile(_head(q, stride.q, row, head), stride.q[2], first, at, length, D, DP, True).to(DOT)
    k, v = _head(k, stride.k, row, head // GROUP), _head(v, stride.v, row, head // GROUP)
    block = (tile_q, mine, first, k, stride.k[2], keep, documents, length, window, scale)
    state = (tl.zeros([M, DP], tl.float32), tl.zeros([M], tl.float32), tl.full([M], LOWEST, tl.float32))
    for lo in range(low, high, N):
        state = _forward_step(state, lo, block, v, stride.v[2], D, DP, M, N, DOT, False)
    before = low - start
    for edge in range(0, before + end - high, N):
        lo = tl.where(edge < before, start, high - before) + edge
        state = _forward_step(state, lo, block, v, stride.v[2], D, DP, M, N, DOT, True)
    acc, total, top = state
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    _store(_head(out, stride.out, row, head), stride.out[2], first, at, length, acc, D, DP)
    sums = tl.where(empty, float("inf"), top + tl.log2(total))
    tl.store(lse + (row * heads + head) * length + first + at, sums, mask=first + at < length)


@triton.jit(do_not_specialize=RUN_TIME)
def row_sums(
    delta, out, grad, stride, length, heads, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """delta = row sum of dO * O."""
    head, row = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    first, at = tl.program_id(1) * M, tl.arange(0, M)
    tile = _tile(_head(out, stride.out, row, head), stride.out[2], first, at, length, D, DP, True).to(tl.float32)
    tile_g = _tile(_head(grad, stride.grad, row, head), stride.grad[2], first, at, length, D, DP, True).to(tl.float32)
    sums = tl.sum(tile * tile_g, 1)
    tl.store(delta + (row * heads + head) * length + first + at, sums, mask=first + at < length)


@triton.jit
def _queries_step(acc, lo, block, tile_g, lse, delta, v, v_stride,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of keys."""
    tile_q, mine, first, k, k_stride, keep, documents, length, window, scale = block
    scores = _scores_of_keys(
        lo, tile_q, mine, first, k, k_stride, keep, documents, length, window, scale, D, DP, M, N, DOT, EDGE
    )
    s, tile_k = scores
    p = tl.exp2(s - lse[:, None])
    tile_v = _tile(v, v_stride, lo, tl.arange(0, N), length, D, DP, EDGE).to(DOT)
    dp = tl.dot(tile_g, tl.trans(tile_v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(DOT), tile_k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=RUN_TIME)
def queries(
    dq, q, k, v, grad, keep, spans, lse, delta, stride, length, heads, rows, window, scale, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    at = tl.arange(0, M)
    bounds = _keys_of(spans, first, length, window, rows, row, M, N)
    start, low, high, end = bounds
    if keep is not None:
        keep += (row * (heads // GROUP) + head // GROUP) * length
    documents, mine = spans, None
    if spans is not None:
        documents = _plane(spans, 0, rows, row, length)
        mine = _numbers(documents, first, at, length, 0, True)
    tile_q = _tile(_head(q, stride.q, row, head), stride.q[2], first, at, length, D, DP, True).to(DOT)
    tile_g = _tile(_head(grad, stride.grad, row, head), stride.grad[2], first, at, length, D, DP, True).to(DOT)
    line = (row * heads + head) * length
    sums = _numbers(lse + line, first, at, length, float("inf"), True)
    mean = _numbers(delta + line, first, at, length, 0.0, True)
    k, v = _head(k, stride.k, row, head // GROUP), _head(v, stride.v, row, head // GROUP)
    block = (tile_q, mine, first, k, stride.k[2], keep, documents, length, window, scale)
    acc = tl.zeros([M, DP], tl.float32)
    for lo in range(low, high, N):
        acc = _queries_step(acc, lo, block, tile_g, sums, mean, v, stride.v[2], D, DP, M, N, DOT, False)
    before = low - start
    for edge in range(0, before + end - high, N):
        lo = tl.where(edge < before, start, high - before) + edge
        acc = _queries_step(acc, lo, block, tile_g, sums, mean, v, stride.v[2], D, DP, M, N, DOT, True)
    _store(_head(dq, stride.out, row, head), stride.out[2], first, at, length, acc * factor, D, DP)


@triton.jit
def _keys_step(state, lo, block, head, stride,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dK, dV and d(log_keep) of one tile of queries, scores as [N, M]."""
    dk, dv, d_keep = state
    tile_k, tile_v, gate, mine, first, documents, length, window, scale = block
    q, grad, lse, delta = head
    at = tl.arange(0, M)
    tile_q = _tile(q, stride.q[2], lo, at, length, D, DP, EDGE).to(DOT)
    s = tl.dot(tile_k, tl.trans(tile_q), input_precision="ieee") * scale
    same = None
    if EDGE and documents is not None:
        same = mine[:, None] == _numbers(documents, lo, at, length, 0, EDGE)[None, :]
    age = (lo + at)[None, :] - (first + tl.arange(0, N))[:, None]
    s = _score(s, gate, age, same, window, EDGE)
    p = tl.exp2(s - _numbers(lse, lo, at, length, float("inf"), EDGE)[None, :])
    tile_g = _tile(grad, stride.grad[2], lo, at, length, D, DP, EDGE).to(DOT)
    dv = tl.dot(p.to(DOT), tile_g, dv, input_precision="ieee")
    dp = tl.dot(tile_v, tl.trans(tile_g), input_precision="ieee")
    ds = p * (dp - _numbers(delta, lo, at, length, 0.0, EDGE)[None, :])
    dk = tl.dot(ds.to(DOT), tile_q, dk, input_precision="ieee")
    if gate is not None:
        if EDGE:
            d_keep += tl.sum(tl.where(age >= window, ds, 0.0), 1)
        else:
            d_keep += tl.sum(ds, 1)
    return dk, dv, d_keep


@triton.jit(do_not_specialize=RUN_TIME)
def keys(
    dk, dv, d_keep, q, k, v, grad, keep, spans, lse, delta, stride, length, heads, rows, window, scale, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // GROUP
    kv_head, row = tl.program_id(0) % kv_heads, (tl.program_id(0) // kv_heads).to(tl.int64)
    first = tl.program_id(1) * N
    at = tl.arange(0, N)
    bounds = _queries_of(spans, first, length, window, rows, row, M, N)
    start, low, high, end = bounds
    line = (row * kv_heads + kv_head) * length
    documents, mine, gate = spans, None, None
    if spans is not None:
        documents = _plane(spans, 0, rows, row, length)
        mine = _numbers(documents, first, at, length, 0, True)
    if keep is not None:
        gate = (_numbers(keep + line, first, at, length, 0.0, True) * LOG2E)[:, None]
    tile_k = _tile(_head(k, stride.k, row, kv_head), stride.k[2], first, at, length, D, DP, True).to(DOT)
    tile_v = _tile(_head(v, stride.v, row, kv_head), stride.v[2], first, at, length, D, DP, True).to(DOT)
    block = (tile_k, tile_v, gate, mine, first, documents, length, window, scale)
    state = (tl.zeros([N, DP], tl.float32), tl.zeros([N, DP], tl.float32), tl.zeros([N], tl.float32))
    before = low - start
    for member in range(GROUP):
        q_head = kv_head * GROUP + member
        numbers = (row * heads + q_head) * length
        head = (_head(q, stride.q, row, q_head), _head(grad, stride.grad, row, q_head), lse + numbers, delta + numbers)
        for edge in range(0, before + end - high, M):
            lo = tl.where(edge < before, start, high - before) + edge
            state = _keys_step(state, lo, block, head, stride, D, DP, M, N, DOT, True)
        for lo in range(low, high, M):
            state = _keys_step(state, lo, block, head, stride, D, DP, M, N, DOT, False)
    sum_k, sum_v, sum_keep = state
    _store(_head(dk, stride.dk, row, kv_head), stride.dk[2], first, at, length, sum_k * factor, D, DP)
    _store(_head(dv, stride.dk, row, kv_head), stride.dk[2], first, at, length, sum_v, D, DP)
    if keep is not None:
        tl.store(d_keep + line + first + at, sum_keep, mask=first + at < length)
