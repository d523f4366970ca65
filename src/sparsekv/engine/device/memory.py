"""What an engine takes beside the pool of pages, in bytes: known before anything is allocated, so that a pool which is
a share of the free memory leaves room for it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

SPARE = 512 * 2**20
"""Compiled kernels, recorded graphs, cuBLAS's workspace, and what the allocator cannot use."""


def table_bytes(*, windows: Sequence[int], kv_heads: int, rows: int, columns: int) -> int:
    """Of a RaggedCache: page tables of `columns` entries, rings of `windows`, lengths, tokens seen, tickets and
    samples; not what policies remember by row."""
    numbers = len(windows) * rows * (kv_heads * (columns + 1) + 1) + rows * kv_heads * (sum(windows) + 1)
    return 4 * numbers + 8 * (rows + 1)


def working_bytes(model: PreTrainedModel, *, rows: int, tokens: int, sizes: Sequence[int] = ()) -> int:
    """An upper estimate of a step of `tokens` tokens that samples `rows`: one layer's activations, the logits with what
    sampling makes of them, and the logits of each recorded graph. sizes: batches that may be recorded."""
    config, element = model.config.get_text_config(decoder=True), model.dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, kv_heads * head_dim
    # Residual, its norm, the attention's and the layer's output; q and k before and after rotation; gate, up, product.
    activations = element * tokens * (4 * config.hidden_size + 3 * queries + 6 * keys + 3 * config.intermediate_size)
    # As computed twice (decodes and chunks are put together), float32 with penalties or log-probabilities three times,
    # and the history that penalties need: a bool and an int32.
    sampling = rows * config.vocab_size * (2 * element + 3 * 4 + 5)
    return activations + sampling + sum(sizes) * config.vocab_size * element + SPARE


def check_page_size(page_size: int, device: torch.device) -> None:
    """Raises ValueError where the kernels of this device cannot read such pages."""
    if device.type == "cuda" and page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; on a GPU it must be a power of two, such as 32")
