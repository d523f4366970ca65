"""The neuron source: eviction logits that the queries carry, in a channel that attention then does without.

z[t] = scale * q[t, c] + offset, q the first query head of each group before RoPE, after the query norm where the model
has one (arXiv 2506.05345, section 3.1). A forward hook on the module that makes q reads the channel and zeroes it;
`sparse_attention` zeroes it once more after RoPE, unless the checkpoint was trained without that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsekv import dms
from sparsekv.modeling.attached import AttachedLayer
from sparsekv.modeling.attention_layers import AttentionLayers

_NORM_AFTER_ROPE = {"NanoChatAttention"}


def as_read(logits: Tensor) -> Tensor:
    """The source of a DMSPolicy whose layers hand over logits instead of hidden states: [T, kv_heads] -> the same."""
    return logits


def check(layers: AttentionLayers, source: dms.NeuronSource) -> None:
    """Raises ValueError, naming the reason, for a model without such a channel."""
    if not isinstance(source, dms.NeuronSource):
        raise ValueError(f"neuron is {source!r}; pass a sparsekv.dms.NeuronSource")
    if not -layers.head_dim <= source.channel < layers.head_dim:
        raise ValueError(f"neuron channel {source.channel} does not exist: the query heads have {layers.head_dim}")
    for index in layers.governed:
        _query_projection(layers, index)


def install(
    layers: AttentionLayers, index: int, *, attached: AttachedLayer, source: dms.NeuronSource
) -> Callable[[], None]:
    """Let the layer get its logits from the queries; returns what undoes it."""
    attached.neuron = source
    read = partial(_read_logits, attached, source, _query_heads(layers))
    return _query_projection(layers, index).register_forward_hook(read).remove


def _read_logits(
    attached: AttachedLayer, source: dms.NeuronSource, heads: int, _: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """The forward hook: leaves the logits for the attention function, returns the queries without the channel."""
    attachment = attached.attachment
    transposed = _is_transposed(args[0], heads)
    queries = _by_head(output, heads, attachment.head_dim, transposed)
    attached.call.hidden = dms.neuron_logits(
        queries, attachment.kv_heads, channel=source.channel, scale=source.scale, offset=source.offset
    )
    output = output.clone()
    queries = _by_head(output, heads, attachment.head_dim, transposed)
    dms.zero_neuron_(queries, attachment.kv_heads, channel=source.channel, keep=attachment.keep)
    return output


def _query_projection(layers: AttentionLayers, index: int) -> nn.Module:
    """The module whose output is the queries before RoPE."""
    module = layers.modules[index]
    name = type(module).__name__
    norm = getattr(module, "q_norm", None)
    if isinstance(norm, nn.Module) and name not in _NORM_AFTER_ROPE:
        return norm
    width = _query_heads(layers) * layers.head_dim
    fused = width + 2 * layers.kv_heads * layers.head_dim
    for attribute, expected in (("q_proj", width), ("qkv_proj", fused)):
        projection = getattr(module, attribute, None)
        if isinstance(projection, nn.Module) and getattr(projection, "out_features", None) == expected:
            return projection
    raise ValueError(
        f"the neuron source cannot read the queries of {name}: it has no q_norm, q_proj or qkv_proj that ends in "
        f"{width} query channels; use the linear source, policy='dms' with its own heads"
    )


def _query_heads(layers: AttentionLayers) -> int:
    return layers.text_config.num_attention_heads


def _is_transposed(x: Tensor, heads: int) -> bool:
    """Whether a query norm's input is [B, heads, S, D], as in Gemma 3, and not [B, S, heads, D], as in Qwen3. The
    strides tell where S = heads: the input is a view of the projection's output [B, S, heads * D]."""
    if x.ndim != 4 or x.shape[1] != heads:
        return False
    return x.shape[2] != heads or x.stride(1) < x.stride(2)


def _by_head(output: Tensor, heads: int, head_dim: int, transposed: bool) -> Tensor:
    """The queries in a projection's output as a view [B, S, heads, D]."""
    if output.ndim == 4:
        return output.transpose(1, 2) if transposed else output
    return output[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
