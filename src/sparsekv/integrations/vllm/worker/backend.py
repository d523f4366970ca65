"""The attention backend that vLLM sees: a cache shape, and the metadata of a step. Attention itself is in layer."""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from sparsekv.attend import Part
from sparsekv.integrations.vllm.settings import PAGE_SIZE
from sparsekv.integrations.vllm.worker.buffers import StepBuffers
from sparsekv.integrations.vllm.worker.fill import Step


@dataclass
class SparseMetadata(AttentionMetadata):
    """A step that is not recorded, or of decodes alone."""

    parts: list[Part]
    """Decodes, which come first, and chunks of prompts."""


class SparseBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Makes the metadata of a step, once for all layers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer: Any = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self._buffers: StepBuffers = layer.sparsekv.rows.buffers

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseMetadata:
        """Waits for nothing: lengths and rows stay on the device."""
        m = common_attn_metadata
        count = m.num_reqs
        starts = m.query_start_loc[: count + 1]
        decodes, *_ = split_decodes_and_prefills(m, decode_threshold=1)
        self._buffers.fill(
            Step(
                blocks=m.block_table_tensor,
                slots=m.slot_mapping,
                starts=starts,
                after=m.seq_lens[:count],
                decodes=decodes,
            )
        )
        on_host = m.query_start_loc_cpu[: count + 1]
        lengths = on_host[decodes + 1 :] - on_host[decodes:-1]
        chunks = int((lengths > 0).sum())
        parts = [self._buffers.decodes(decodes)] if decodes else []
        if chunks:
            longest, tokens = int(lengths.max()), int(lengths.sum())
            mine = starts[decodes : decodes + chunks + 1]
            parts.append(self._buffers.chunks(mine, decodes, longest=longest, tokens=tokens))
        return SparseMetadata(parts=parts)


class SparseImpl(AttentionImpl[SparseMetadata]):
    """What vLLM asks of an implementation beside attending. The scale may be set anew at run time."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Our layers never come here."""
        raise AssertionError("SparseAttention attends by its own op")


class SparseBackend(AttentionBackend):
    """Set by the loader on each governed layer."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[SparseBuilder]:
        return SparseBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[Any]:
        return [PAGE_SIZE]  # so that vLLM never splits a block

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Any shape of the right size does: a worker sees its tensor as pages."""
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)
