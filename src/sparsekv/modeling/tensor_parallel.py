"""Tensor parallelism, Transformers' own: processes share one model, each with its share of every layer's heads.

Hidden states, eviction logits and gates are the same in all processes, over all KV heads; only attention takes its own
heads' gates. Backwards their gradients are gathered, so those of the eviction heads are whole everywhere.
"""

from functools import cache

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AutoConfig

from sparsekv.assets.embedded import resolve_model


def own_heads(gates: Tensor, heads: int) -> Tensor:
    """gates: [B, H, S], the same in all processes -> [B, heads, S]: where this one attends with fewer than H KV heads,
    those it holds."""
    if heads == gates.shape[1]:
        return gates
    whole = DTensor.from_local(gates, _all_processes(gates.device.type), [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(1)]).to_local()


@cache
def _all_processes(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))


def check_shared(name: str, processes: int) -> None:
    """Raises ValueError, before any weight is read, for a model that so many processes cannot share."""
    config = AutoConfig.from_pretrained(resolve_model(name)).get_text_config(decoder=True)
    if not config.base_model_tp_plan:
        raise ValueError(f"Transformers has no tensor parallel plan for {config.model_type}: use tensor_parallel: 1")
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if kv_heads % processes:
        raise ValueError(f"tensor_parallel is {processes}; it must divide the {kv_heads} KV heads of {name}")
