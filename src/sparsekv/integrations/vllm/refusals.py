"""What cannot run with rows of our own, refused at start-up by name and with the way out."""

from collections.abc import Iterator
from typing import Any

from sparsekv.integrations.vllm.arguments import CONNECTOR
from sparsekv.integrations.vllm.settings import PAGE_SIZE


def check_config(config: Any) -> None:
    """config: a vllm.config.VllmConfig. Raises ValueError for the first thing that is refused."""
    for refused, sentence in _of_config(config):
        if refused:
            raise ValueError(f"sparsekv in vLLM: {sentence}")


def check_layer(name: str, layer: Any) -> None:
    """layer: an attention layer of the loaded model. Raises ValueError where it is not plain causal attention."""
    for refused, sentence in _of_layer(layer):
        if refused:
            raise ValueError(
                f"sparsekv in vLLM: layer {name} {sentence}; serve this model with sparsekv.LLM or densely"
            )


def _of_config(config: Any) -> Iterator[tuple[bool, str]]:
    model, cache, parallel, transfer = (
        config.model_config,
        config.cache_config,
        config.parallel_config,
        config.kv_transfer_config,
    )
    yield (
        transfer is None or transfer.kv_connector != CONNECTOR,
        f"the KV connector is {None if transfer is None else transfer.kv_connector}, and rows are told and reported "
        f"through {CONNECTOR}; take --kv-transfer-config from `sparsekv vllm-args`, and no other connector beside it",
    )
    yield (
        bool(cache.enable_prefix_caching),
        "prefix caching shares blocks between requests, and heads forget other tokens in each; pass "
        "--no-enable-prefix-caching",
    )
    yield (
        config.speculative_config is not None,
        "speculative decoding takes tokens back, and a slot that was overwritten cannot be; leave out "
        "--speculative-config",
    )
    yield (
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "context parallelism splits a sequence over GPUs by position; use --tensor-parallel-size",
    )
    yield bool(parallel.enable_dbo), "micro-batches (DBO) run a step in two; leave out --enable-dbo"
    yield bool(model.use_mla), "this model attends to latents (MLA), which have no KV heads; serve it densely"
    yield (
        model.runner_type != "generate" or bool(model.is_encoder_decoder),
        "only decoders that generate can forget; serve this model densely",
    )
    yield (
        cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
        f"the KV cache is {cache.cache_dtype} and pages hold the model's own type; leave out --kv-cache-dtype",
    )
    yield (
        cache.block_size != PAGE_SIZE,
        f"a block is a page of {PAGE_SIZE} slots and --block-size is {cache.block_size}; pass --block-size {PAGE_SIZE}",
    )
    yield (
        cache.kv_offloading_size is not None,
        "offloading moves vLLM's blocks, which hold no tokens here; leave out --kv-offloading-size",
    )
    yield bool(cache.kv_sharing_fast_prefill), "leave out --kv-sharing-fast-prefill: every layer must see every token"
    yield bool(model.enable_sleep_mode), "sleep mode throws pages away under the rows; leave out --enable-sleep-mode"


def _of_layer(layer: Any) -> Iterator[tuple[bool, str]]:
    kind = type(layer).__name__
    yield kind != "Attention", f"is {kind}, not plain attention"
    yield layer.attn_type != "decoder", f"is of type {layer.attn_type}, not causal"
    yield layer.sliding_window is not None, f"has a sliding window of {layer.sliding_window} tokens of its own"
    yield bool(layer.has_sink), "has attention sinks of its own"
    yield layer.kv_sharing_target_layer_name is not None, f"shares the cache of {layer.kv_sharing_target_layer_name}"
    yield layer.head_size_v != layer.head_size, f"has values of size {layer.head_size_v} for keys of {layer.head_size}"
    yield bool(layer.use_mm_prefix), "attends both ways within images"
    yield getattr(layer.impl, "alibi_slopes", None) is not None, "biases scores by position (ALiBi)"
    yield bool(getattr(layer.impl, "logits_soft_cap", None)), "caps its scores"
