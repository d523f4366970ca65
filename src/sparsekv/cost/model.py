"""The paper's cost model of one decode step in 16 bits (arXiv 2506.05345), with a compression ratio.

n layers, batch B, context L, ratio CR (tokens seen / tokens held), d_q = heads x head size (d in the paper's models):

    FLOPs      = n B (6 d d_ff + 4 d d_q + 4 d d_kv + 4 d_q L / CR) + 2 B d V
    bytes read = n (6 d d_ff + 4 d d_q + 4 d d_kv + 4 B L / CR d_kv) + 2 d V
    seconds    = max(FLOPs / peak FLOP/s, bytes read / bandwidth)

What a real step adds is left out: launches, activations, softmax, pages that are not full. A layer with a sliding
window holds min(L, window) tokens and is not compressed.
"""

from sparsekv.cost.hardware import Hardware
from sparsekv.cost.shapes import ModelShape


def flops(shape: ModelShape, *, batch: int, context: int, ratio: float = 1) -> float:
    """Of one step: a token for each of `batch` sequences, each after `context` tokens."""
    attention = 4 * shape.d_q * _tokens(shape, context=context, ratio=ratio)
    return batch * (shape.layers * _matrices(shape) + attention + 2 * shape.d * shape.vocab)


def kv_bytes(shape: ModelShape, *, batch: int, context: int, ratio: float = 1) -> float:
    """Bytes of the keys and values held, all of which a step reads."""
    return 4 * batch * shape.d_kv * _tokens(shape, context=context, ratio=ratio)


def weight_bytes(shape: ModelShape, *, held: bool = False) -> int:
    """Bytes of weights that a step reads; `held` = those in memory, with an embedding that is not tied."""
    matrices = 1 + (held and not shape.tied)
    return shape.layers * _matrices(shape) + matrices * 2 * shape.d * shape.vocab


def bytes_read(shape: ModelShape, *, batch: int, context: int, ratio: float = 1) -> float:
    """Of one step: every weight once, and the keys and values of every sequence."""
    return weight_bytes(shape) + kv_bytes(shape, batch=batch, context=context, ratio=ratio)


def step_seconds(
    shape: ModelShape, hardware: Hardware, *, batch: int, context: int, ratio: float = 1
) -> tuple[float, float]:
    """(what the FLOPs take, what the bytes take); the step takes the larger one."""
    return (
        flops(shape, batch=batch, context=context, ratio=ratio) / hardware.flops,
        bytes_read(shape, batch=batch, context=context, ratio=ratio) / hardware.bandwidth,
    )


def _matrices(shape: ModelShape) -> int:
    """FLOPs of a token in one layer's matrices; as many as they have bytes in 16 bits."""
    return 6 * shape.d * shape.d_ff + 4 * shape.d * (shape.d_q + shape.d_kv)


def _tokens(shape: ModelShape, *, context: int, ratio: float) -> float:
    """Tokens that a KV head holds, summed over layers."""
    full = shape.layers - shape.window_layers
    return full * context / ratio + shape.window_layers * min(context, shape.window)
