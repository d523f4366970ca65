"""gate in Triton, forward and backward; only the output and its log-sum-exp are kept, so memory grows with tokens.

    forward    a block of queries, a head       O = softmax(score) V, LSE = log2 sum 2^s, s = log2(e) * score
    queries    a block of queries, a head       dQ = scale * dS K
    keys       a block of keys, a KV head       dV = P^T dO, dK = scale * dS^T Q, d(log_keep) = the column sums of dS
                                                over q - k >= window
    with       P = 2^(s - LSE), dS = P * (dO V^T - delta), delta = row sums of dO * O

The equations are FlashAttention-2's (arXiv 2307.08691). `keys` loops over the group's query heads and over the queries,
so no sum crosses programs: no atomics, the same bits every time. Tiles that causality or documents exclude are never
met, and no length is compiled in. A query that sees nothing gets 0, a gate of minus infinity gradient 0.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsekv.ops.dot_type import dot_type
from sparsekv.ops.gate import kernels
from sparsekv.ops.gate.cuts import Cut, GateConfig, config_of
from sparsekv.ops.gate.spans import spans_of

SUM_ROWS = 64


class _Strides(NamedTuple):
    """Of sequence, head and token."""

    q: tuple[int, int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    out: tuple[int, int, int]
    grad: tuple[int, int, int]
    dk: tuple[int, int, int]


def obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels cannot run, as the end of a sentence; None if they can."""
    kinds = {q.dtype, k.dtype, v.dtype}
    if len(kinds) > 1 or not kinds <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"needs bfloat16, float16 or float32 throughout, not {', '.join(sorted(map(str, kinds)))}"
    dim = q.shape[-1]
    if dim % 16 or dim > 256 or v.shape[-1] != dim:
        return f"needs a head size that is a multiple of 16 up to 256, not {dim} and {v.shape[-1]} for values"
    return None


def gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    window: int,
    scale: float,
    documents: Tensor | None,
    config: GateConfig | None = None,
) -> Tensor:
    """See api.gate. config: how the kernels are cut, for benchmarks and tests; None takes the tuned one."""
    config = config or config_of(q.shape[-1], q.dtype, device=q.device)
    keep = None if log_keep is None else log_keep.float().contiguous()
    spans = None if documents is None else spans_of(documents)
    window = 0 if keep is None else window
    return _gate(_aligned(q), _aligned(k), _aligned(v), keep, spans, window, scale, config.flat())[0]


@torch.library.custom_op("sparsekv::gate", mutates_args=())
def _gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    spans: Tensor | None,
    window: int,
    scale: float,
    cuts: list[int],
) -> tuple[Tensor, Tensor]:
    """(out, LSE float32 [B, H * G, S])."""
    out, lse = _by_token(q), _lines(q)
    cut = GateConfig.of(cuts).forward
    with torch.cuda.device_of(q):
        kernels.forward[_grid(q, cut.queries)](
            *(out, lse, q, k, v, log_keep, spans, _strides(q, k, v, out, out, out)),
            *_sizes(q, window, scale),
            **_options(q, k, cut),
        )
    return out, lse


@torch.library.custom_op("sparsekv::gate_backward", mutates_args=())
def _gate_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    spans: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    window: int,
    scale: float,
    cuts: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, d(log_keep) float32 [B, H, S], unwritten without a gate)."""
    dq, dk, dv, d_keep, delta = _by_token(q), _by_token(k), _by_token(k), _lines(k), _lines(q)
    grad, config = _aligned(grad), GateConfig.of(cuts)
    strides = _strides(q, k, v, out, grad, dk)
    inputs = (q, k, v, grad, log_keep, spans, lse, delta, strides, *_sizes(q, window, scale), scale)
    blocks: dict[str, Any] = {"M": SUM_ROWS}
    with torch.cuda.device_of(q):
        kernels.row_sums[_grid(q, SUM_ROWS)](*(delta, out, grad, strides, q.shape[2], q.shape[1]), **_dims(q), **blocks)
        kernels.keys[_grid(k, config.by_key.keys)](dk, dv, d_keep, *inputs, **_options(q, k, config.by_key))
        kernels.queries[_grid(q, config.by_query.queries)](dq, *inputs, **_options(q, k, config.by_query))
    return dq, dk, dv, d_keep


@_gate.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _by_token(q), _lines(q)


@_gate_backward.register_fake
def _(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _by_token(q), _by_token(k), _by_token(k), _lines(k)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_keep, spans, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_keep, spans, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    dq, dk, dv, d_keep = _gate_backward(*ctx.saved_tensors, grad, *ctx.numbers)
    return dq, dk, dv, d_keep if ctx.needs_input_grad[3] else None, None, None, None, None


_gate.register_autograd(_differentiate, setup_context=_remember)


def _by_token(x: Tensor) -> Tensor:
    """Unwritten, as x [B, H, S, D], a token's heads side by side in memory: what the next projection reads."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _lines(x: Tensor) -> Tensor:
    """Unwritten, float32 [B, H, S]."""
    return x.new_empty(x.shape[:3], dtype=torch.float32)


def _stride(x: Tensor) -> tuple[int, int, int]:
    """In elements; 0 where it does not matter. Multiples of 16, which the compiler relies on."""
    sequence, head, token = (stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape, strict=False))
    return sequence, head, token


def _strides(*tensors: Tensor) -> _Strides:
    return _Strides(*map(_stride, tensors))


def _aligned(x: Tensor) -> Tensor:
    """x itself where a kernel can read its rows, else a copy."""
    return x if x.stride(3) == 1 and all(stride % 16 == 0 for stride in _stride(x)) else x.contiguous()


def _grid(x: Tensor, block: int) -> tuple[int, int]:
    """Heads first, so that the blocks with most to do start together."""
    return x.shape[0] * x.shape[1], -(-x.shape[2] // block)


def _sizes(q: Tensor, window: int, scale: float) -> tuple[int, int, int, int, float]:
    return q.shape[2], q.shape[1], q.shape[0], window, scale * math.log2(math.e)


def _dims(q: Tensor) -> dict[str, Any]:
    return {"D": q.shape[-1], "DP": triton.next_power_of_2(q.shape[-1])}


def _options(q: Tensor, k: Tensor, cut: Cut) -> dict[str, Any]:
    return {
        **_dims(q),
        "GROUP": q.shape[1] // k.shape[1],
        "M": cut.queries,
        "N": cut.keys,
        "DOT": dot_type(q.dtype),
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
