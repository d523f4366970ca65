"""The neuron source: eviction logits that the queries carry, in a channel that attention then does without.

z[t] = scale * q[t, c] + offset, q the first query head of each group before RoPE, after the query norm where the model
has one (arXiv 2506.05345, section 3.1). A forward hook on the module that makes q reads the channel and zeroes it;
`sparse_attention` zeroes it once more after RoPE, unless the checkpoint was trained without that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from sparsekv import dms
from sparsekv.modeling.attached import CALL, AttachedLayer
from sparsekv.modeling.attention_layers import AttentionLayers

_NORM_AFTER_ROPE = {"NanoChatAttention"}


def as_read(logits: Tensor) -> Tensor:
    """The source of a DMSPolicy whose layers hand over logits instead of hidden states: [T, kv_heads] -> the same."""
    return logits


def check(layers: AttentionLayers, source: dms.NeuronSource, *, of: Sequence[str] = ("query",)) -> None:
    """Raises ValueError, naming the reason, for a model without such a channel in its queries (or `of` what else)."""
    if not isinstance(source, dms.NeuronSource):
        raise ValueError(f"neuron is {source!r}; pass a sparsekv.dms.NeuronSource")
    if not -layers.head_dim <= source.channel < layers.head_dim:
        raise ValueError(f"neuron channel {source.channel} does not exist: the query heads have {layers.head_dim}")
    for index in layers.governed:
        for name in of:
            Projected.find(layers, index, name)


def install(
    layers: AttentionLayers, index: int, *, attached: AttachedLayer, source: dms.NeuronSource
) -> Callable[[], None]:
    """Let the layer get its logits from the queries; returns what undoes it."""
    queries = Projected.find(layers, index, "query")
    attached.neuron = source
    return queries.module.register_forward_hook(partial(_read_logits, attached, source, queries)).remove


def _read_logits(
    attached: AttachedLayer,
    source: dms.NeuronSource,
    queries: "Projected",
    _: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """The forward hook: leaves the logits for the attention function, returns the queries without the channel."""
    kv_heads = attached.attachment.kv_heads
    CALL.hidden = dms.neuron_logits(
        queries.by_head(args[0], output), kv_heads, channel=source.channel, scale=source.scale, offset=source.offset
    )
    output, keep = output.clone(), attached.attachment.keep
    dms.zero_neuron_(queries.by_head(args[0], output), kv_heads, channel=source.channel, keep=keep)
    return output


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Where an attention layer has its queries, or its keys, before RoPE."""

    module: nn.Module
    """Its output holds them: the norm after the projection where there is one."""
    linear: nn.Module | None
    """The projection, where it makes nothing else beside them but the other two."""
    first: int
    """Their first channel in the projection's output."""
    heads: int
    head_dim: int

    @classmethod
    def find(cls, layers: AttentionLayers, index: int, of: str) -> Self:
        """of: "query" or "key". Raises ValueError for a layer that makes them in another way."""
        module, query_heads = layers.modules[index], layers.text_config.num_attention_heads
        name, width, q = type(module).__name__, query_heads * layers.head_dim, of[0]
        heads, first = (query_heads, 0) if of == "query" else (layers.kv_heads, width)
        norm = getattr(module, f"{q}_norm", None)
        if not isinstance(norm, nn.Module) or name in _NORM_AFTER_ROPE:
            norm = None
        fused = width + 2 * layers.kv_heads * layers.head_dim
        linear, start = None, 0
        for attribute, at, expected in ((f"{q}_proj", 0, heads * layers.head_dim), ("qkv_proj", first, fused)):
            made = getattr(module, attribute, None)
            if isinstance(made, nn.Module) and getattr(made, "out_features", None) == expected:
                linear, start = made, at
        found = norm or linear
        if found is not None:
            return cls(module=found, linear=linear, first=start, heads=heads, head_dim=layers.head_dim)
        raise ValueError(
            f"the neuron source cannot read the {'queries' if of == 'query' else 'keys'} of {name}: it has no "
            f"{q}_norm, {q}_proj or qkv_proj that ends in {heads * layers.head_dim} {of} channels; use the linear "
            "source, policy='dms' with its own heads"
        )

    def by_head(self, source: Tensor, output: Tensor) -> Tensor:
        """A view [B, S, heads, D] of what the module made of `source`."""
        if output.ndim == 4:
            return output.transpose(1, 2) if self._is_transposed(source) else output
        first = self.first if self.module is self.linear else 0
        return output[..., first : first + self.heads * self.head_dim].unflatten(-1, (self.heads, self.head_dim))

    def _is_transposed(self, x: Tensor) -> bool:
        """Whether a norm's input is [B, heads, S, D], as in Gemma 3, and not [B, S, heads, D], as in Qwen3. The strides
        tell, since it is a view of the projection's output [B, S, heads * D]; S is not compared with the heads, which
        would compile a decode step of so many sequences apart."""
        return x.stride(1) < x.stride(2) if self.heads > 1 else x.shape[2] != 1
