"""The neuron source in vLLM: logits that the queries carry (modeling.queries.neuron), read and zeroed around RoPE.

vLLM's attention modules call their `rotary_emb` with the queries, after the query norm where there is one; a module
around it does what the hooks of modeling.queries.neuron do in Transformers.
"""

from typing import Any

from torch import Tensor, nn

from sparsekv import dms


class NeuronRope(nn.Module):
    """rope: the module's own. kv_heads, head_dim: of this worker's layer; place: a list of one, where the logits are
    left for the layer, float32 [T, kv_heads]."""

    def __init__(
        self, rope: nn.Module, source: dms.NeuronSource, *, kv_heads: int, head_dim: int, place: list[Tensor | None]
    ) -> None:
        super().__init__()
        self.rope = rope
        self.source = source
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.place = place

    def forward(self, positions: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """query: [T, query_heads * head_dim], changed in place as by vLLM's RoPE."""
        source, heads = self.source, query.view(len(query), -1, self.head_dim)
        self.place[0] = dms.neuron_logits(
            heads, self.kv_heads, channel=source.channel, scale=source.scale, offset=source.offset
        )
        dms.zero_neuron_(heads, self.kv_heads, channel=source.channel)
        query, *rest = self.rope(positions, query, *args, **kwargs)
        if source.rezero:
            dms.zero_neuron_(query.view(len(query), -1, self.head_dim), self.kv_heads, channel=source.channel)
        return query, *rest


def wrap_rope(
    parent: nn.Module, source: dms.NeuronSource, *, kv_heads: int, head_dim: int, place: list[Tensor | None]
) -> None:
    """Put a NeuronRope around the RoPE of an attention module. Raises ValueError for a module without one, or without
    the channel."""
    rope = getattr(parent, "rotary_emb", None)
    if not isinstance(rope, nn.Module):
        raise ValueError(
            f"sparsekv in vLLM: the adapter takes its logits from the queries, and {type(parent).__name__} has no "
            "rotary_emb that is given them; use --model-impl vllm, sparsekv.LLM, or an adapter of heads"
        )
    if not -head_dim <= source.channel < head_dim:
        raise ValueError(
            f"sparsekv in vLLM: the adapter's neuron is channel {source.channel} and query heads have {head_dim}; "
            "use the adapter of this model"
        )
    parent.rotary_emb = NeuronRope(rope, source, kv_heads=kv_heads, head_dim=head_dim, place=place)
