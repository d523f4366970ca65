"""DMC's neurons in a model: what its policy decides from is read off queries and keys before RoPE, see dmc.neurons.

Forward hooks where a layer makes its queries and keys read the channel, and the keys, and zero it in every head. The
rotation handed to the layer has a 0 in its place (the channel's cos and sin), so that RoPE, which would turn the
channel's partner into it, leaves it 0 too: in the model's own queries and keys and in the policy's means.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv import dmc
from sparsekv.dms import NeuronSource
from sparsekv.modeling.attached import ATTACHMENT, CALL, AttachedLayer, Attachment
from sparsekv.modeling.attention_layers import AttentionLayers
from sparsekv.modeling.queries import neuron
from sparsekv.modeling.queries.neuron import Projected
from sparsekv.policies import Policy, Step

READER = "sparsekv_dmc"
"""The attribute of an attention module, and of what makes its queries and keys, that holds its Reader."""

BOTH = ("query", "key")
TOLERANCE = 0.05
"""Of the largest key: what bfloat16 may differ in."""


@dataclass(kw_only=True)
class Reader:
    """Reads one layer. In attached.CALL it leaves rotation, cos and sin, [B or 1, S, D], and importance
    [B, S, kv_heads] for the hook that reads the keys."""

    attached: AttachedLayer
    source: NeuronSource
    query: Projected
    key: Projected

    def without_channel(self, output: Tensor, of: Projected, args: tuple[Any, ...]) -> Tensor:
        """A copy of what `of` made of args, the channel zeroed in all heads, or faded as much as training says."""
        output = output.clone()
        keep = self.attached.attachment.keep
        dmc.zero_neuron_(of.by_head(args[0], output), channel=self.source.channel, keep=keep)
        return output


def install(
    layers: AttentionLayers, index: int, *, attached: AttachedLayer, source: NeuronSource
) -> list[Callable[[], Any]]:
    """Let the layer hand packed `dmc.BeforeRope` to its policy; returns what undoes it."""
    query, key = (Projected.find(layers, index, of) for of in BOTH)
    reader, module = Reader(attached=attached, source=source, query=query, key=key), layers.modules[index]
    undo: list[Callable[[], Any]] = [module.register_forward_pre_hook(_read_rotation, with_kwargs=True).remove]
    for hooked, hook in ((query.module, _read_queries), (key.module, _read_keys)):
        undo.append(hooked.register_forward_hook(hook).remove)
    for holder in {id(m): m for m in (module, query.module, key.module)}.values():
        setattr(holder, READER, reader)
        undo.append(partial(delattr, holder, READER))
    return undo


# Functions of the module, not closures: layers that run the same code are compiled once.


def _read_rotation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    reader: Reader = getattr(module, READER)
    cos, sin = kwargs["position_embeddings"]
    if reader.source.rezero:
        cos, sin = cos.clone(), sin.clone()
        for turned in (cos, sin):
            turned[..., reader.source.channel] *= reader.attached.attachment.keep
    CALL.rotation = cos, sin
    return args, kwargs | {"position_embeddings": (cos, sin)}


def _read_queries(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    reader: Reader = getattr(module, READER)
    source = reader.source
    CALL.importance = dmc.importance(
        reader.query.by_head(args[0], output),
        reader.key.heads,
        channel=source.channel,
        scale=source.scale,
        offset=-source.offset,
    )
    return reader.without_channel(output, reader.query, args)


def _read_keys(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    reader: Reader = getattr(module, READER)
    source, rotation, importance = reader.source, CALL.rotation, CALL.importance
    CALL.rotation = CALL.importance = None
    assert rotation is not None and importance is not None, "queries are made before keys"
    logits = dmc.merge_logits(
        reader.key.by_head(args[0], output), channel=source.channel, scale=source.scale, offset=source.offset
    )
    output = reader.without_channel(output, reader.key, args)
    key = reader.key.by_head(args[0], output)
    cos, sin = (x.expand(*key.shape[:2], -1) for x in rotation)
    CALL.hidden = dmc.BeforeRope(logits, importance, key, cos, sin).pack()
    return output


@torch.no_grad()
def clear_channel(model: PreTrainedModel) -> None:
    """Zero what makes the channel, so that all logits are the offset and all importances alike: where training begins
    once the model does without it. A norm of queries or keys then divides by a little less."""
    for module in model.modules():
        reader = getattr(module, READER, None)
        if not isinstance(reader, Reader):
            continue
        for part in (reader.query, reader.key):
            linear: Any = part.linear
            rows = part.first + torch.arange(part.heads) * part.head_dim + reader.source.channel % part.head_dim
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter[rows.to(parameter.device)] = 0


def merge_logits(hidden: Tensor, *, kv_heads: int) -> Tensor:
    """The source of a DMCPolicy: [T, ...], packed -> [T, kv_heads]."""
    return hidden[..., :kv_heads]


def check(layers: AttentionLayers, source: NeuronSource) -> None:
    """Raises ValueError, naming the reason, for a model without such a channel or one that cannot be cleared."""
    neuron.check(layers, source, of=BOTH)
    for index in layers.governed:
        if any(Projected.find(layers, index, of).linear is None for of in BOTH):
            name = type(layers.modules[index]).__name__
            raise ValueError(f"policy 'dmc' needs projections of queries and keys alone, and {name} mixes others in")


@torch.no_grad()
def check_rotation(model: PreTrainedModel) -> None:
    """A small forward of an attached model: what is read before RoPE, turned, must be the keys that attention gets.

    Raises ValueError for a model that turns its keys otherwise.
    """
    attachment: Attachment = getattr(model, ATTACHMENT)
    probe, reason = _Probe(), ""
    with _probing(attachment, probe):
        try:
            model(input_ids=torch.arange(8, device=model.device)[None], use_cache=False)
        except (KeyError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
    if reason or not probe.error <= TOLERANCE:
        raise ValueError(
            f"policy 'dmc' cannot turn the keys of {type(model).__name__} itself, which must be by Llama's RoPE over "
            f"the whole head ({reason or f'they differ by {probe.error:.2g}'}); use policy='dms'"
        )


class _Probe(Policy):
    """Dense. Notes the largest difference from what attention gets."""

    def __init__(self) -> None:
        self.error = 0.0

    def marks(self, step: Step) -> None:
        read = dmc.BeforeRope.unpack(step.hidden, *step.key.shape[1:])
        error = (dmc.rotate(read.key, read.cos, read.sin) - step.key).abs().max() / step.key.abs().max()
        self.error = max(self.error, float(error))


@contextmanager
def _probing(attachment: Attachment, probe: Policy):
    """Within, the probe is the policy of every governed layer."""
    governed = [attached for attached in attachment.layers if attached.policy is attachment.policy]
    for attached in governed:
        attached.policy = probe
    try:
        yield
    finally:
        for attached in governed:
            attached.policy = attachment.policy
