"""linear as one persistent Triton kernel for few tokens: every weight is read once, at the memory's speed.

The product's tiles of BN outputs are laid end to end in units of BK inputs and cut into equal shares, one a program
(Stream-K, arXiv 2301.03598), so that all processors read equally much whatever the shape. Of a tile cut into pieces,
each piece leaves its float32 sums; the program that arrives last adds them in order and puts the tile's ticket back to
zero. The result is deterministic.

Under programmatic dependent launch (Hopper and later) a program is there before the kernel in front has ended: it asks
the L2 cache for its first weights, which depend on nothing, and only then waits for its inputs.
"""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekv.ops.device import processors
from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.launch import dependent, follow, take_turn

MOST_TOKENS = 32
"""Beyond, inputs are no longer small beside the weights, and cuBLAS was as fast or faster."""
TICKETS = 4096
"""Tiles of the widest product."""
SCRATCH = 1 << 21
"""float32 numbers: two pieces of a tile a program."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How the kernel is cut."""

    outputs: int = 64
    """BN, at least 64 for the tensor cores of Hopper."""
    inputs: int = 128
    """BK."""
    warps: int = 4
    stages: int = 3
    programs: int = 3
    """Programs per multiprocessor, which share its memory."""
    ahead: int = 4
    """Units of weights asked for before the wait."""


def config_of(tokens: int, outputs: int, device: torch.device) -> LinearConfig:
    """As tuned on an H100: many small programs where there are tiles for all, else one with many stages in flight."""
    if tokens <= 16 and outputs >= 2 * 64 * processors(device):
        return LinearConfig()
    return LinearConfig(stages=9 if tokens <= 16 else 6, programs=1)


def obstacle(x: Tensor, weight: Tensor) -> str | None:
    """Why this kernel cannot run, as the end of a sentence; None if it can."""
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return f"needs inputs and weights both in bfloat16 or both in float16, not {x.dtype} and {weight.dtype}"
    if not 0 < len(x) <= MOST_TOKENS:
        return f"takes 1 to {MOST_TOKENS} tokens, not {len(x)}"
    if not weight.is_contiguous():
        return "needs contiguous weights"
    if len(weight) > TICKETS * LinearConfig().outputs:
        return f"takes at most {TICKETS * LinearConfig().outputs} outputs, not {len(weight)}"
    return None


def linear(x: Tensor, weight: Tensor, workspace: Tensor, config: LinearConfig | None) -> Tensor:
    """See api.linear."""
    tokens, size = x.shape
    config = config or config_of(tokens, len(weight), x.device)
    padded = max(triton.next_power_of_2(tokens), 16)
    tiles = triton.cdiv(len(weight), config.outputs)
    out = torch.empty(tokens, len(weight), dtype=x.dtype, device=x.device)
    steps = triton.cdiv(size, config.inputs)
    share = triton.cdiv(tiles * steps, config.programs * processors(x.device))
    programs = triton.cdiv(tiles * steps, share)
    tickets, scratch = workspace[:TICKETS], workspace[TICKETS:].view(torch.float32)
    assert tiles <= TICKETS and 2 * programs * config.outputs * padded <= SCRATCH, "the workspace is too small"
    _linear[(programs,)](
        x.contiguous(), weight, out, scratch, tickets, tokens, share,
        N=len(weight), K=size, BM=padded, BN=config.outputs, BK=config.inputs,
        PIECES=(steps + share - 2) // share + 1, DOT=dot_type(x.dtype),
        AHEAD=config.ahead, PARTS=max(1, config.warps * 32 // config.outputs),
        FOLLOW=follow(x.device), num_warps=config.warps, num_stages=config.stages, **dependent(x.device),
    )  # fmt: skip
    return out


def workspace(device: torch.device) -> Tensor:
    """int32, zero where tickets are. Products that share one must follow each other in one stream."""
    return torch.zeros(TICKETS + SCRATCH, dtype=torch.int32, device=device)


@triton.jit
def _ask(
    weight, tile, first,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BYTES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Ask the L2 cache for PARTS * BYTES bytes from element `first` of each of the tile's rows on."""
    lane = tl.arange(0, BN * PARTS)
    row = tl.minimum(tile * BN + lane // PARTS, N - 1).to(tl.int64)
    at = (weight + row * K + first).to(tl.int64) + lane % PARTS * BYTES
    size = tl.full([BN * PARTS], BYTES, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [at, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _settle(
    out, scratch, tickets, tile, share, tokens,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Count a piece of a tile; add all pieces if it was the last."""
    first, last = tile * STEPS // share, ((tile + 1) * STEPS - 1) // share
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == last - first:
        m, n = tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None]
        live = (tile * BN + n < N) & (m < tokens)
        total = tl.zeros([BN, BM], tl.float32)
        for i in tl.static_range(PIECES):  # unrolled, so that all loads are under way at once
            program = first + i
            piece = 2 * program + (tile * STEPS >= program * share).to(tl.int32)
            # .cg: other processors wrote these, so this one's own cache must not answer.
            at = scratch + piece * (BN * BM) + n * BM + m
            total += tl.load(at, mask=live & (program <= last), other=0.0, cache_modifier=".cg")
        tl.store(out + m.to(tl.int64) * N + tile * BN + n, total, mask=live)
        tl.store(tickets + tile, 0)


@triton.jit(do_not_specialize=["scratch", "tickets", "tokens", "share"])
def _linear(
    x, weight, out, scratch, tickets, tokens, share,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PIECES: tl.constexpr, DOT: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    TILES: tl.constexpr = (N + BN - 1) // BN
    WHOLE: tl.constexpr = (N % BN == 0) and (K % BK == 0)
    begin = program * share
    end = tl.minimum(begin + share, TILES * STEPS)
    if FOLLOW:
        if (AHEAD > 0) & (K % BK == 0):
            UNITS: tl.constexpr = min(AHEAD, STEPS)
            BYTES: tl.constexpr = UNITS * BK * weight.dtype.element_ty.primitive_bitwidth // 8 // PARTS
            _ask(weight, begin // STEPS, tl.minimum(begin % STEPS, STEPS - UNITS) * BK, N, K, BN, BYTES, PARTS)
        take_turn()

    m, n = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros([BN, BM], tl.float32)
    for unit in range(begin, end):
        tile, step = unit // STEPS, unit % STEPS
        k = step * BK + tl.arange(0, BK)
        rows = tile * BN + n
        at = weight + rows.to(tl.int64)[:, None] * K + k[None, :]
        if WHOLE:
            w = tl.load(at)
        else:
            w = tl.load(at, mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0)
        a = tl.load(x + m[None, :] * K + k[:, None], mask=(m < tokens)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(w.to(DOT), a.to(DOT), acc, input_precision="ieee")
        if (step == STEPS - 1) | (unit == end - 1):
            start = tile * STEPS
            whole = (start >= begin) & (start + STEPS <= end)
            live = (rows < N)[:, None] & (m < tokens)[None, :]
            tl.store(out + m.to(tl.int64)[None, :] * N + rows[:, None], acc, mask=live & whole)
            piece = 2 * program + (start >= begin).to(tl.int32)
            tl.store(scratch + piece * (BN * BM) + n[:, None] * BM + m[None, :], acc, mask=live & (not whole))
            acc = tl.zeros([BN, BM], tl.float32)
    if begin < end:
        tl.debug_barrier()  # all threads' stores come before the one thread's release
        low, high = begin // STEPS, (end - 1) // STEPS
        if (low * STEPS < begin) | ((low + 1) * STEPS > end):
            _settle(out, scratch, tickets, low, share, tokens, N, BM, BN, STEPS, PIECES)
        if (high > low) & ((high + 1) * STEPS > end):
            _settle(out, scratch, tickets, high, share, tokens, N, BM, BN, STEPS, PIECES)
