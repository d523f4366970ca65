"""A whole decode step: the unmodified model under torch.compile and a CUDA graph, with our attention and placement.

The roofline is the time to read the weights and the live keys and values at the speed of a copy measured in the same
run. Weights are random; marks are drawn at the ratio asked; lengths are log-normal over heads (bench.fill).
"""

import math
from statistics import NormalDist
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekv.bench.fill import fill, pages_for, spread_lengths
from sparsekv.bench.shapes import Shape
from sparsekv.bench.timing import copy_bandwidth, environment, median_ms
from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.engine.cache import EngineCache
from sparsekv.engine.graphs import DecodeGraphs
from sparsekv.modeling.attach import attach, attachment_of, detach, heads

SLACK_STEPS = 256
"""Decode steps that a filled cache has room for: warm-up and repeats append tokens too."""


def random_model(shape: Shape, *, context: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The shape with random weights, in evaluation mode."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(context), dtype=dtype).eval().requires_grad_(False)


def mark_at(model: PreTrainedModel, ratio: float) -> None:
    """Set the eviction heads so that a share 1 - 1 / ratio of tokens is marked, by chance: the logit of
    a normalised input under a unit weight is a standard normal number."""
    share = 1 - 1 / ratio
    bias = NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))
    for head in heads(model):
        torch.nn.init.normal_(head.weight, std=head.weight.shape[1] ** -0.5)
        torch.nn.init.constant_(head.bias, bias)


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of all weights, and of those that a decode step reads: an untied embedding gives only a row per token."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return total, total if tied else total - embedding.numel() * embedding.element_size()


class FilledEngine:
    """An attached model over a cache that holds `batch` sequences of `context` tokens at `ratio`, ready to step."""

    def __init__(
        self,
        model: PreTrainedModel,
        shape: Shape,
        *,
        batch: int,
        context: int,
        ratio: float,
        window: int,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameter = next(model.parameters())
        self.device, self.batch, self.context = parameter.device, batch, context
        if ratio > 1:
            attach(model, policy="dms", window=window)
            mark_at(model, ratio)
        else:
            attach(model, policy="dense")
        self.model = model
        mean = context / ratio
        longest = math.ceil(min(context, 8 * mean))
        count = batch * shape.kv_heads
        if ratio > 1:
            lengths = torch.stack(
                [spread_lengths(count, mean, longest, generator, least=window) for _ in range(shape.layers)]
            )
        else:
            lengths = torch.full((shape.layers, count), context)
        lengths = lengths.view(shape.layers, batch, shape.kv_heads)
        spare = math.ceil(SLACK_STEPS / 32) * lengths.numel()
        pool = PagePool(
            pages_for(lengths, 32) + spare,
            page_size=32,
            head_dim=shape.head_dim,
            dtype=parameter.dtype,
            device=self.device,
        )
        windows = [site.policy.window(site.layer) for site in attachment_of(model).sites]
        self.ragged = RaggedCache(pool, windows, kv_heads=shape.kv_heads, rows=batch, max_tokens=longest + SLACK_STEPS)
        fill(self.ragged, lengths, generator, seen=context, marked=1 - 1 / ratio)
        self.cache = EngineCache(attachment_of(model), self.ragged)
        self.live_bytes = 2 * int(lengths.sum()) * shape.head_dim * parameter.element_size()
        self.used_bytes = pool.pages_in_use * pool.page_bytes + self._ring_bytes()

    def _ring_bytes(self) -> int:
        return sum(ring.numel() * ring.element_size() for ring in self.ragged.rings)

    def graphs(self) -> DecodeGraphs:
        """Compile and record the step."""
        return DecodeGraphs(self.model, self.cache, sizes=[self.batch], device=self.device)

    def close(self) -> None:
        """Detach the model."""
        detach(self.model)


def bench_step(
    model: PreTrainedModel, shape: Shape, *, batch: int, context: int, ratio: float, window: int, seed: int = 0
) -> dict[str, Any]:
    """One decode step of `batch` sequences, in milliseconds, beside its roofline and the dense roofline."""
    filled = FilledEngine(model, shape, batch=batch, context=context, ratio=ratio, window=window, seed=seed)
    device = filled.device
    try:
        graphs = filled.graphs()
        ids = torch.randint(0, shape.vocabulary, (batch,), device=device)
        rows = torch.arange(batch, device=device)
        positions = torch.full((batch,), context, device=device)
        ms = median_ms(lambda: graphs.run(ids, rows, positions), device, repeats=30)
    finally:
        filled.close()
    copy = copy_bandwidth(device)
    total, read = weight_bytes(model)
    dense_bytes = batch * context * shape.kv_bytes(next(model.parameters()).element_size())
    return {
        "bench": "step",
        "shape": shape.name,
        "batch": batch,
        "context": context,
        "ratio": ratio,
        "window": window,
        "ms": ms,
        "roofline_ms": 1e3 * (total + filled.live_bytes) / copy,
        "roofline_read_weights_ms": 1e3 * (read + filled.live_bytes) / copy,
        "dense_roofline_ms": 1e3 * (total + dense_bytes) / copy,
        "of_roofline": ms * copy / 1e3 / (total + filled.live_bytes),
        "copy_bytes_per_s": copy,
        "live_bytes": filled.live_bytes,
        "used_bytes_over_live": filled.used_bytes / filled.live_bytes,
        "seed": seed,
        **environment(device),
    }
