"""An oracle that shares no code with the package or with Transformers: Llama and Qwen3 decoders as formulas.

One unpadded text, full square attention, the rule of delayed eviction as a mask, logits from wherever the test says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `decoder` computes."""

    logits: Tensor
    """[S, vocab]."""
    z: Tensor
    """[layers, kv_heads, S]: the eviction logits, by the position that computes them."""
    marks: Tensor
    """bool [layers, kv_heads, S], by the token that they decide."""


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """z = scale * q[last channel] - shift, as the public checkpoints write it."""

    scale: float = 100.0
    shift: float = 5.0
    rezero: bool = True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE of [H, S, D]: channel i turns with channel i + D / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@torch.no_grad()
def decoder(
    config: Any,
    state: dict[str, Tensor],
    ids: Tensor,
    *,
    window: int,
    lag: int = 0,
    source: Neuron | Callable[[int, Tensor], Tensor],
) -> Written:
    """ids: int64 [S]. state: the checkpoint's tensors. source: a neuron, or a function from (layer, residual stream
    before the input norm [S, hidden]) to z [S, kv_heads]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    eps, heads, kv_heads = config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
    dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
    position = torch.arange(len(ids))
    age = position[:, None] - position
    x, zs, marks = state["model.embed_tokens.weight"][ids], [], []
    for layer in range(config.num_hidden_layers):
        w = {name.split(f"layers.{layer}.")[-1]: t for name, t in state.items() if f"layers.{layer}." in name}

        def project(h: Tensor, name: str, w: dict[str, Tensor] = w) -> Tensor:
            """[heads, S, D], after the query or key norm where there is one."""
            out = h @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", torch.zeros(()))
            out = out.view(len(h), -1, dim).transpose(0, 1)
            norm = w.get(f"self_attn.{name}_norm.weight")
            return out if norm is None else rms_norm(out, norm, eps)

        h = rms_norm(x, w["input_layernorm.weight"], eps)
        q, k, v = (project(h, name) for name in "qkv")
        first = torch.arange(0, heads, heads // kv_heads)
        if isinstance(source, Neuron):
            z = source.scale * q[first, :, -1] - source.shift
            q[first, :, -1] = 0
        else:
            z = source(layer, x).T
        q, k = rotate(q, theta), rotate(k, theta)
        if isinstance(source, Neuron) and source.rezero:
            q[first, :, -1] = 0
        mark = torch.zeros(z.shape, dtype=torch.bool)
        mark[:, : len(ids) - lag] = z[:, lag:] > 0
        seen = (age >= 0) & (~mark[:, None, :] | (age < window))
        seen, k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (seen, k, v))
        weights = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        out = (weights @ v).transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
        x = x + out + w.get("self_attn.o_proj.bias", torch.zeros(()))
        h = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
        zs.append(z)
        marks.append(mark)
    logits = rms_norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T
    return Written(logits=logits, z=torch.stack(zs), marks=torch.stack(marks))
