"""From an attached model and a configuration to an engine: size the pool, record the graphs."""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekv.attend import allocate, choose_page_size, page_bytes
from sparsekv.cache.pages import human_bytes, parse_bytes
from sparsekv.cache.state import HeadShape
from sparsekv.engine.config import EngineConfig
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.chunk_graphs import SEQUENCES, SIZES, ChunkGraphs
from sparsekv.engine.device.graphs import DecodeGraphs, buckets_up_to, compiled_decode, why_not_recordable
from sparsekv.engine.device.memory import check_page_size, table_bytes, working_bytes
from sparsekv.engine.device.runner import Runner
from sparsekv.engine.engine import Engine
from sparsekv.engine.schedule.ledger import Caps, Ledger
from sparsekv.engine.schedule.scheduler import Scheduler
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.attached import Attachment
from sparsekv.ops.device import free_memory
from sparsekv.policies import Policy

log = logging.getLogger(__name__)

GPU_SHARE, CPU_SHARE = 0.9, 0.5
"""Parts of the free memory for the pool where kv_memory is not given; on a GPU of what tables, activations and graphs
leave."""


def build_engine(model: PreTrainedModel, config: EngineConfig, *, tokenizer: Any, ratio: float) -> Engine:
    """An engine over an attached model. ratio: the compression ratio to expect before any is measured.

    Raises ValueError where max_model_len exceeds what the model can do, or kv_memory holds no page.
    """
    attachment, device = attachment_of(model), model.device
    length = _max_model_len(model, attachment, config)
    policies = [attached.policy for attached in attachment.layers]
    shape = attachment.head_shape(model.dtype)
    page_size = choose_page_size(policies, config.page_size)
    check_page_size(page_size, device)
    peaks = [policy.most_in_prompt(layer, length) for layer, policy in enumerate(policies)]
    columns = -(-max(peaks) // page_size)
    beside = 0
    if device.type == "cuda":
        windows = [policy.window(layer) for layer, policy in enumerate(policies)]
        beside = table_bytes(windows=windows, kv_heads=shape.kv_heads, rows=config.max_num_seqs, columns=columns)
        sizes = [*buckets_up_to(config.max_num_seqs), *[SEQUENCES] * len(SIZES)]
        tokens = config.max_num_batched_tokens + SIZES[-1]  # a graph keeps its activations
        beside += working_bytes(model, rows=config.max_num_seqs, tokens=tokens, sizes=sizes)
    free, share = free_memory(device) - beside, GPU_SHARE if device.type == "cuda" else CPU_SHARE
    ragged = allocate(
        policies,
        shape,
        pages=_pages(policies, shape, config, page_size=page_size, peaks=peaks, free=free, share=share),
        page_size=page_size,
        rows=config.max_num_seqs,
        max_tokens=max(peaks),
        device=device,
    )
    cache = EngineCache(attachment, ragged)
    caps = Caps(
        in_prompt=peaks,
        held=lambda prompt, tokens: [p.most_held(i, prompt=prompt, tokens=tokens) for i, p in enumerate(policies)],
        prunes=[policy.prunes for policy in policies],
        max_tokens=length,
    )
    ledger = Ledger(caps=caps, rows=ragged.rows, kv_heads=shape.kv_heads, page_size=page_size, pages=ragged.pool.pages)
    graphs = _graphs(model, cache, config, max_tokens=length)
    asynchronous = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
    return Engine(
        Runner(model, cache, graphs=graphs, chunk_graphs=_chunk_graphs(graphs, max_tokens=length)),
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


def _pages(
    policies: list[Policy],
    shape: HeadShape,
    config: EngineConfig,
    *,
    page_size: int,
    peaks: list[int],
    free: int,
    share: float,
) -> int:
    """How many pages the pool has. peaks: by layer, the slots that a head takes at most; free: bytes of memory, of
    which the pool takes `share` where nothing is said."""
    each = page_bytes(policies, shape, page_size=page_size)
    most = config.max_num_seqs * shape.kv_heads * sum(-(-peak // page_size) for peak in peaks)
    size = _bytes(config.kv_memory, free=free, share=share)
    if size < each:
        raise ValueError(f"kv_memory of {human_bytes(size)} holds no page of {human_bytes(each)}; raise it")
    return min(size // each, most)


def _bytes(size: int | str | float | None, *, free: int, share: float) -> int:
    if size is None:
        size = share
    if isinstance(size, float):
        return int(free * size)
    return parse_bytes(size)


def _graphs(
    model: PreTrainedModel, cache: EngineCache, config: EngineConfig, *, max_tokens: int
) -> DecodeGraphs | None:
    if config.enforce_eager or model.device.type != "cuda":
        return None
    reason = why_not_recordable(cache.executor.policies)
    if reason is not None:
        log.warning("decode steps run without CUDA graphs: %s", reason)
        return None
    with torch.no_grad():
        sizes = buckets_up_to(cache.ragged.rows)
        return DecodeGraphs(compiled_decode(model, cache), cache, sizes=sizes, max_tokens=max_tokens)


def _chunk_graphs(graphs: DecodeGraphs | None, *, max_tokens: int) -> ChunkGraphs | None:
    """For policies of which chunks can be padded."""
    if graphs is None or not all(policy.pads_chunks for policy in graphs.cache.executor.policies):
        return None
    pool = torch.cuda.graph_pool_handle()
    return ChunkGraphs(graphs.forward, graphs.cache, pool=pool, max_tokens=max_tokens)
