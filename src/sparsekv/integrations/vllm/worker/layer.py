"""SparseAttention: vLLM's attention layer with our executor behind one op.

The eviction heads read the input of the attention *module*, which vLLM's attention *layer* is not given: a forward
pre-hook on the module leaves it in a place that the layer empties, which torch.compile traces through. The op then has
it as an argument: a true dependence, and no pointer that outlives a CUDA graph's step.

vLLM may record the op in graphs of both kinds: of decodes alone, by the metadata of the step that is recorded, and of a
number of tokens, which it records without metadata (buffers). So it is none of the ops at which vLLM splits a model.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from sparsekv.dms import NeuronSource
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec
from sparsekv.integrations.vllm.worker.backend import SparseBackend, SparseImpl, SparseMetadata
from sparsekv.integrations.vllm.worker.neuron import wrap_rope
from sparsekv.integrations.vllm.worker.rows import SHORTAGE, Rows


@dataclass(frozen=True, kw_only=True)
class Governed:
    """What a layer knows of ours."""

    index: int
    """Among the layers of this worker."""
    rows: Rows
    spec: CreditSpec
    last: bool
    """Whether it is the worker's last layer."""


class SparseAttention(Attention):
    """Never constructed: `govern` makes vLLM's layer one."""

    sparsekv: Governed
    sparsekv_hidden: list[Tensor | None]
    """The place that the hook fills, or with a neuron source NeuronRope, with the logits."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Of all layers of the worker together; vLLM asks the first alone, whose tensor the others share."""
        return self.sparsekv.spec

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
    ) -> Tensor:
        """query: [T, H * G * D]; key, value: [T, H * D]. Returns [T, H * G * D]."""
        hidden = self.sparsekv_hidden[0]
        self.sparsekv_hidden[0] = None
        assert hidden is not None, "an attention layer ran outside its module"
        query = query.view(-1, self.num_heads, self.head_size)
        key, value = (x.view(-1, self.num_kv_heads, self.head_size) for x in (key, value))
        output = torch.ops.sparsekv.vllm_attend(query, key, value, hidden.flatten(0, -2), self.layer_name)
        return output.flatten(1)


def govern(
    layer: Attention,
    parent: nn.Module,
    governed: Governed,
    *,
    shares_with: str | None,
    neuron: NeuronSource | None,
) -> None:
    """Make `layer`, which the module `parent` calls, one of ours. shares_with: the name of the worker's first layer,
    for all others; neuron: where the queries carry the logits."""
    layer.__class__ = SparseAttention
    assert isinstance(layer, SparseAttention)
    layer.sparsekv = governed
    layer.sparsekv_hidden = [None]
    layer.attn_backend = SparseBackend
    layer.impl = SparseImpl(
        layer.num_heads,
        layer.head_size,
        layer.impl.scale,  # pyright: ignore[reportAttributeAccessIssue]
        layer.num_kv_heads,
        kv_cache_dtype=layer.kv_cache_dtype,
    )
    layer.kv_sharing_target_layer_name = shares_with
    if neuron is not None:
        options = {"kv_heads": layer.num_kv_heads, "head_dim": layer.head_size}
        wrap_rope(parent, neuron, place=layer.sparsekv_hidden, **options)
        return
    setattr(parent, "sparsekv_hidden", layer.sparsekv_hidden)  # noqa: B010
    parent.register_forward_pre_hook(_leave_hidden, with_kwargs=True)


def _leave_hidden(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hidden states by their name, or else the first argument of floating point: vLLM's modules take (positions,
    hidden_states), those of Transformers (hidden_states, ...)."""
    found = kwargs.get("hidden_states")
    module.sparsekv_hidden[0] = next(x for x in args if x.is_floating_point()) if found is None else found


@torch.library.custom_op("sparsekv::vllm_attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, layer_name: str) -> Tensor:
    """query: [T, H * G, D]; key, value: [T, H, D]; hidden: [T, any]. Returns [T, H * G, D]. T may be padded."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    found: Any = context.attn_metadata
    metadata: SparseMetadata | None = found[layer_name] if isinstance(found, dict) else found
    governed: Governed = layer.sparsekv
    rows = governed.rows
    if not rows.ready:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)  # vLLM measures memory
    tokens, scale = (hidden, query, key, value), layer.impl.scale
    if metadata is None or context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
        output = rows.attend_recorded(governed.index, tokens, scale)
    else:
        output = rows.attend(governed.index, metadata.parts, tokens, scale)
    if governed.last and output.is_cuda:
        # The host hears of a shortage late (Rows.report): no token may leave the device before.
        enough = rows.cache.pool.free_count[0] >= 0
        torch._assert_async(enough, SHORTAGE)  # pyright: ignore[reportPrivateImportUsage]
    return output


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
