"""From an attached model and a configuration to an engine: size the pool, record the graphs."""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekv.cache.pages import PagePool, human_bytes, parse_bytes
from sparsekv.cache.ragged import RaggedCache
from sparsekv.engine.config import EngineConfig
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.graphs import DecodeGraphs, buckets_up_to, compiled_decode, why_not_graphable
from sparsekv.engine.device.runner import Runner
from sparsekv.engine.engine import Engine
from sparsekv.engine.schedule.ledger import Ledger
from sparsekv.engine.schedule.scheduler import Scheduler
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.attached import Attachment
from sparsekv.ops.device import free_memory

log = logging.getLogger(__name__)

GPU_SHARE, CPU_SHARE = 0.9, 0.5
"""Fractions of the free memory for the pool where kv_memory is not given."""


def build_engine(model: PreTrainedModel, config: EngineConfig, *, tokenizer: Any, ratio: float) -> Engine:
    """An engine over an attached model. ratio: the compression ratio to expect before any is measured.

    Raises ValueError where max_model_len exceeds what the model can do, or kv_memory holds no page.
    """
    attachment, device = attachment_of(model), model.device
    length = _max_model_len(model, attachment, config)
    caps = [attached.policy.most_held(attached.layer, length) for attached in attachment.layers]
    pool = _pool(model, attachment, config, caps=caps)
    ragged = RaggedCache(
        pool,
        [attached.policy.window(attached.layer) for attached in attachment.layers],
        kv_heads=attachment.kv_heads,
        rows=config.max_num_seqs,
        max_tokens=length,
        rewrites=[attached.policy.rewrites for attached in attachment.layers],
    )
    cache = EngineCache(attachment, ragged)
    ledger = Ledger(
        layers=len(caps),
        rows=ragged.rows,
        kv_heads=attachment.kv_heads,
        page_size=config.page_size,
        pages=pool.pages,
        caps=caps,
    )
    graphs = _graphs(model, cache, config)
    asynchronous = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
    return Engine(
        Runner(model, cache, graphs=graphs),
        Scheduler(ledger, rows=ragged.rows, max_tokens=config.max_num_batched_tokens, ratio=ratio),
        max_model_len=length,
        vocab=model.config.get_text_config(decoder=True).vocab_size,
        eos=eos_ids(model, tokenizer),
        tokenizer=tokenizer,
        async_scheduling=asynchronous,
    )


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text: those at which plain generate ends it, and the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return frozenset(i for i in [*ids, getattr(tokenizer, "eos_token_id", None)] if i is not None)


def _max_model_len(model: PreTrainedModel, attachment: Attachment, config: EngineConfig) -> int:
    length, most = config.max_model_len or attachment.max_tokens, attachment.max_tokens
    if length > most:
        raise ValueError(f"max_model_len is {length} and the model's context is {most}; lower it")
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        short = rope.get("original_max_position_embeddings") or most
        if length > short:
            raise ValueError(
                f"this model's longrope changes with the longest sequence of a batch beyond {short} tokens; "
                f"pass max_model_len={short} or less"
            )
    return length


def _pool(model: PreTrainedModel, attachment: Attachment, config: EngineConfig, *, caps: list[int]) -> PagePool:
    dtype, device = model.dtype, model.device
    page_bytes = 2 * config.page_size * attachment.head_dim * dtype.itemsize
    most = config.max_num_seqs * attachment.kv_heads * sum(-(-cap // config.page_size) for cap in caps)
    size = _bytes(config.kv_memory, device)
    if size < page_bytes:
        raise ValueError(f"kv_memory of {human_bytes(size)} holds no page of {human_bytes(page_bytes)}; raise it")
    pages = min(size // page_bytes, most)
    return PagePool(pages, page_size=config.page_size, head_dim=attachment.head_dim, dtype=dtype, device=device)


def _bytes(size: int | str | float | None, device: torch.device) -> int:
    if size is None:
        size = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    if isinstance(size, float):
        return int(free_memory(device) * size)
    return parse_bytes(size)


def _graphs(model: PreTrainedModel, cache: EngineCache, config: EngineConfig) -> DecodeGraphs | None:
    if config.enforce_eager or model.device.type != "cuda":
        return None
    reason = why_not_graphable(cache)
    if reason is not None:
        log.warning("decode steps run without CUDA graphs: %s", reason)
        return None
    with torch.no_grad():
        return DecodeGraphs(compiled_decode(model, cache), cache, sizes=buckets_up_to(cache.ragged.rows))
