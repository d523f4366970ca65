"""SparseLoader, vLLM's load format `sparsekv`: another loader's model with our attention in its layers.

What it allocates (heads, page tables) is there before vLLM profiles memory, so that room is left for it.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import extract_layer_index

from sparsekv.dms import EvictionHead
from sparsekv.integrations.vllm.refusals import check_config, check_layer
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec
from sparsekv.integrations.vllm.settings import Method, make, read_settings, resolve
from sparsekv.integrations.vllm.worker.layer import Governed, govern
from sparsekv.integrations.vllm.worker.rows import Rows

INNER = "load_format"
"""Of --model-loader-extra-config: the format that the weights are in (default "auto"); the rest is that loader's."""


class SparseLoader(BaseModelLoader):
    """Loads by another loader, then governs."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra: Any = load_config.model_loader_extra_config
        extra = dict(extra) if isinstance(extra, dict) else {}
        inner = extra.pop(INNER, "auto")
        self._inner = get_model_loader(replace(load_config, load_format=inner, model_loader_extra_config=extra))

    def download_model(self, model_config: ModelConfig) -> None:
        """As the inner loader."""
        self._inner.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """As the inner loader."""
        self._inner.load_weights(model, model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Raises ValueError, before any weight is read, for what is refused."""
        check_config(vllm_config)
        method = resolve(read_settings(vllm_config.additional_config), model_config.hf_config)
        model = self._inner.load_model(vllm_config, model_config, prefix)
        install(model, vllm_config, method)
        return model


def install(model: nn.Module, vllm_config: VllmConfig, method: Method) -> None:
    """Govern every attention layer of a loaded model. Raises ValueError for a layer that is refused."""
    layers = attention_of(vllm_config)
    parents = parents_of(model, layers)
    config = vllm_config.model_config
    names = list(layers)
    first = layers[names[0]]
    device = next(model.parameters()).device
    numbers = [extract_layer_index(name) for name in names]
    heads = [_heads(method, number, first.num_kv_heads, config, vllm_config, device) for number in numbers]
    policy = make(method, heads, device=device)
    rows = Rows(
        [policy] * len(names),
        kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        page_size=vllm_config.cache_config.block_size,
        rows=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=config.max_model_len,
        step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        dtype=first.kv_cache_torch_dtype,
        device=device,
    )
    spec = _spec(first, vllm_config, method)
    neuron = None if method.loaded is None else method.loaded.config.neuron
    for index, name in enumerate(names):
        governed = Governed(index=index, rows=rows, spec=spec, last=index == len(names) - 1)
        shares_with = names[0] if index else None
        govern(layers[name], parents[name], governed, shares_with=shares_with, neuron=neuron)


def attention_of(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The worker's attention layers by name, in order. Raises ValueError where one is refused, or the model keeps
    state of another kind."""
    found: dict[str, Attention] = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, Attention):
            if isinstance(layer, AttentionLayerBase):
                check_layer(name, layer)
            continue  # what else vLLM calls by name, such as its mixtures of experts
        check_layer(name, layer)
        found[name] = layer
    if len({(layer.num_kv_heads, layer.head_size, layer.kv_cache_torch_dtype) for layer in found.values()}) != 1:
        raise ValueError("sparsekv in vLLM: attention layers differ in KV heads or head size; serve this model densely")
    return found


def parents_of(model: nn.Module, layers: dict[str, Attention]) -> dict[str, nn.Module]:
    """The modules that are given the hidden states which the layers' heads read, by layer name."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    parents: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        path = names.get(id(layer))
        if path is not None and "." in path:
            parents[name] = modules[path.rsplit(".", 1)[0]]
    if len(parents) == len(layers):
        return parents
    # vLLM's Transformers backend keeps its layers in a dict; a module of Transformers names its layer by number.
    by_index = {
        module.layer_idx: module
        for name, module in modules.items()
        if isinstance(getattr(module, "layer_idx", None), int) and name.endswith("attn")
    }
    try:
        return {name: by_index[extract_layer_index(name)] for name in layers}
    except KeyError:
        raise ValueError(
            "sparsekv in vLLM: this model's attention layers have no module around them that takes hidden states; try "
            "--model-impl vllm or --model-impl transformers"
        ) from None


def _heads(
    method: Method, layer: int, kv_heads: int, config: ModelConfig, vllm_config: VllmConfig, device: torch.device
) -> EvictionHead | None:
    """The eviction head of a layer, its rows those of this rank's KV heads; None where there is none. Raises ValueError
    where a rank lacks the query heads that carry the logits."""
    total, ranks = config.get_total_num_kv_heads(), get_tensor_model_parallel_world_size()
    if method.loaded is None:
        return None
    if method.loaded.config.neuron is not None:
        if ranks > total:
            raise ValueError(
                f"sparsekv in vLLM: the first query head of each of {total} groups carries the logits, and not every "
                f"one of {ranks} ranks has one; use --tensor-parallel-size {total}"
            )
        return None
    first = first_head(total=total, rank=get_tensor_model_parallel_rank(), ranks=ranks)
    if layer not in method.loaded.heads:
        raise ValueError(f"sparsekv in vLLM: the adapter has no heads for layer {layer}; fetch or train it again")
    weights = method.loaded.heads[layer]
    head = EvictionHead(weights["weight"].shape[1], kv_heads, device=device)
    head.load_state_dict({key: tensor[first : first + kv_heads] for key, tensor in weights.items()})
    return head.requires_grad_(False)


def first_head(*, total: int, rank: int, ranks: int) -> int:
    """The first of a rank's KV heads among all; with more ranks than heads, each head is on several."""
    return rank * (total // ranks) if total >= ranks else rank // (ranks // total)


def _spec(layer: Attention, vllm_config: VllmConfig, method: Method) -> CreditSpec:
    """The same on all workers: of the largest pipeline stage."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    stages, total = parallel.pipeline_parallel_size, config.get_total_num_hidden_layers()
    layers = max(end - first for first, end in (get_pp_indices(total, stage, stages) for stage in range(stages)))
    return CreditSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=layers * layer.num_kv_heads,
        head_size=layer.head_size,
        head_size_v=layer.head_size,
        dtype=layer.kv_cache_torch_dtype,
        rows=vllm_config.scheduler_config.max_num_seqs,
        workers=stages * parallel.tensor_parallel_size,
        ratio=method.ratio,
        window=method.window,
        most=method.most,
        trusted_ratio=method.settings.trusted_ratio,
    )
