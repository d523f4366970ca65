"""The one attention function: plain `generate`, `eval`, training and the engine all go through it.

With a SparseCache the tokens are placed and read by the layer's policy. Without a cache the whole sequence is attended
at once, with the policy's marks as a mask (the hard rule) or, in training, as a soft gate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import find_packed_sequence_indices

from sparsekv import dms
from sparsekv.attend import whole_layer
from sparsekv.modeling.attached import ATTACHED, CALL, AttachedLayer
from sparsekv.modeling.padding import packing_of
from sparsekv.modeling.tensor_parallel import own_heads
from sparsekv.policies import Step

NAME = "sparsekv"
"""The name under which Transformers knows this attention function."""


def register() -> None:
    """Tell Transformers of the two functions below; no model but an attached one asks for them."""
    AttentionInterface.register(NAME, sparse_attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. query: [B, H * G, S, D]; key, value: [B, H, S, D]; attention_mask: bool
    [B, columns so far] or None; documents, a keyword of the model's forward, without a cache: int [B, S], see ops.gate,
    or None where each row is one text, which spares the search for them in the mask and the positions. Returns
    ([B, S, H * G, D], None); the output of padding is 0 with a cache.

    Raises ValueError for what the cache cannot honour: dropout, a 4D mask, a foreign cache.
    """
    attached: AttachedLayer = getattr(module, ATTACHED)
    cache, hidden = CALL.cache, CALL.hidden
    CALL.cache = CALL.hidden = None
    assert hidden is not None, "the pre-hook of attach() has not run"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout:
        raise ValueError(
            "attention dropout is not supported: load the model with attention_dropout=0 (GPT-2: attn_pdrop=0)"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("a custom 4D attention mask is not supported: pass the 2D padding mask or none")
    if attached.neuron is not None and attached.neuron.rezero:
        query = query.clone()
        dms.zero_neuron_(
            query.transpose(1, 2), key.shape[1], channel=attached.neuron.channel, keep=attached.attachment.keep
        )
    if cache is not None:
        return cache.attend(attached, hidden, (query, key, value), attention_mask, scale), None
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            "this model is attached to sparsekv and got a cache that is not ours: "
            "pass past_key_values=sparsekv.SparseCache(model), or detach(model) first"
        )
    if attention_mask is not None:  # longer where checkpointed training took the cache away from a decode step
        attention_mask = attention_mask[:, -query.shape[2] :]
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, RoPE leaves them in float32
    documents = (
        kwargs["documents"]
        if "documents" in kwargs
        else _documents(attention_mask, kwargs.get("position_ids"), query.shape)
    )
    step = _whole_step(attached, hidden, (query, key, value), attention_mask, scale)
    gates = attached.attachment.gates
    qkv = (query, key, value)
    return whole_layer(attached.policy, step, qkv, gates=gates, documents=documents, own_heads=own_heads), None


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """Transformers' mask interface: the 2D padding mask as it is, or None. Causality and windows are the policy's.

    Raises ValueError for bidirectional blocks (image tokens that see each other), which no page layout here expresses.
    """
    if kwargs.get("use_vmap"):
        raise ValueError("this model lets some tokens see later ones (image blocks), which sparsekv does not support")
    return attention_mask


def _documents(mask: Tensor | None, position_ids: Tensor | None, shape: torch.Size) -> Tensor | None:
    """int [B, S]: which tokens belong together; padding and packed documents (positions that start anew) keep apart."""
    if mask is not None:
        return mask.int()
    if position_ids is None or shape[2] == 1:
        return None
    return find_packed_sequence_indices(position_ids.expand(shape[0], -1))


def _whole_step(
    attached: AttachedLayer, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scale: float
) -> Step:
    rows, length = hidden.shape[:2]
    packing = packing_of((rows, length), None, hidden.device)
    pad = torch.zeros(rows, dtype=torch.int32, device=hidden.device)
    if mask is not None:
        pad = (~mask.bool()).int().cumprod(-1).sum(-1, dtype=torch.int32)  # left padding shifts positions
    query, key, value = (packing.pack(x) for x in qkv)
    return Step(
        layer=attached.layer,
        batch=packing.batch,
        hidden=hidden.flatten(0, 1),
        query=query,
        key=key,
        value=value,
        seen=-pad,
        scale=scale,
        most=length,
    )
