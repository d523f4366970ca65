"""A whole decode step: the unmodified model under torch.compile and a CUDA graph, with our attention and placement.

The roofline is the time to read the weights and the live keys and values at the speed of a copy measured in the same
run. Weights are random; marks are drawn at the ratio asked; lengths are log-normal over heads (bench.fill).
"""

import math
from collections import Counter
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekv.attend import Executor, allocate, choose_page_size
from sparsekv.bench.fill import fill, pages_for, remember, spread_lengths
from sparsekv.bench.shapes import Shape
from sparsekv.bench.timing import copy_bandwidth, median_ms
from sparsekv.cache.ragged import RaggedCache
from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.graphs import DecodeGraphs, compiled_decode
from sparsekv.modeling.attach import attach, heads
from sparsekv.policies import Policy, make_policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.quest import DENSE_LAYERS, DMSQuestPolicy, QuestPolicy
from sparsekv.provenance import environment

SLACK_STEPS = 256
"""Decode steps that a filled cache has room for: warm-up and repeats append tokens too."""
IN_A_ROW = 8
"""Steps timed as one, as the engine runs them: the host prepares a step while the device is at the one before."""


def random_model(shape: Shape, *, context: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The shape with random weights, in evaluation mode."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(context), dtype=dtype).eval().requires_grad_(False)


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes of all weights, and of those that a decode step reads: an untied embedding gives only a row per token."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return total, total if tied else total - embedding.numel() * embedding.element_size()


class StepBench:
    """One model, compiled once, stepped over caches of any size, policy and ratio."""

    def __init__(self, shape: Shape, *, window: int, context: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.window, self.device, self.dtype = shape, window, device, dtype
        self.context = context + SLACK_STEPS
        self.model = random_model(shape, context=self.context, device=device, dtype=dtype)
        self.weights = weight_bytes(self.model)
        self.attachment = attach(self.model, policy="dms", window=window)
        self.head_shape = self.attachment.head_shape(dtype)
        self.copy = copy_bandwidth(device)
        self.cache = EngineCache(self.attachment, self._empty(Policy(), 1, 1, pages=1))
        self.forward = compiled_decode(self.model, self.cache)

    @torch.no_grad()
    def run(
        self, *, batch: int, context: int, ratio: float, policy: str = "dms", seed: int = 0, kernels: int = 0
    ) -> dict[str, Any]:
        """Median milliseconds of a step of `batch` sequences that have seen `context` tokens and hold context / ratio.

        ratio 1 is dense attention: no marks, no rings. Quest holds all and reads context / ratio; DMS + Quest reads a
        quarter of what it holds. kernels: how many of the longest-running kernels to list.
        """
        method = self.policy(policy, context, ratio)
        live, used = self._fill(method, batch, context, ratio, seed)
        graphs = DecodeGraphs(self.forward, self.cache, sizes=[batch], max_tokens=self.context)
        ids = torch.randint(0, self.shape.vocabulary, (batch,), device=self.device)
        rows = torch.arange(batch, device=self.device)
        positions = torch.full((batch,), context, device=self.device)

        def step() -> Tensor:
            return graphs.run(ids, rows, positions)

        def steps() -> None:
            for _ in range(IN_A_ROW):
                step()

        ms = median_ms(steps, self.device, repeats=10) / IN_A_ROW
        result = self._report(batch, context, ratio, ms=ms, live=live, used=used)
        result |= {"policy": "dense" if ratio == 1 else policy, "seed": seed}
        if kernels:
            result["kernels"] = kernel_times(step, most=kernels)
        return result

    def policy(self, name: str, context: int, ratio: float) -> Policy:
        """By name, holding (Quest: reading) context / ratio tokens."""
        own = self.attachment.policy
        assert isinstance(own, DMSPolicy)
        if ratio == 1:
            return Policy()
        if name == "dms":
            return own
        if name == "dms-quest":
            return DMSQuestPolicy(own.sources, window=self.window, budget=math.ceil(context / ratio / 4))
        return make_policy(name, cr=ratio, tokens=context)

    def _report(self, batch: int, context: int, ratio: float, *, ms: float, live: int, used: int) -> dict[str, Any]:
        total, read = self.weights
        everything = total + batch * context * self.shape.kv_bytes(self.dtype.itemsize)
        return {
            "bench": "step",
            "shape": self.shape.name,
            "batch": batch,
            "context": context,
            "ratio": ratio,
            "window": self.window,
            "ms": ms,
            "roofline_ms": 1e3 * (total + live) / self.copy,
            "over_roofline": ms * self.copy / 1e3 / (total + live),
            "roofline_without_embedding_ms": 1e3 * (read + live) / self.copy,
            "dense_roofline_ms": 1e3 * everything / self.copy,
            "copy_bytes_per_s": self.copy,
            "live_kv_bytes": live,
            "used_over_live_kv_bytes": used / live,
            **environment(self.device),
        }

    def _fill(self, policy: Policy, batch: int, context: int, ratio: float, seed: int) -> tuple[int, int]:
        """Replace the cache's rows; returns the bytes of keys, values and bounds that a step reads, and of the pages
        and rings that they take."""
        generator = torch.Generator().manual_seed(seed)
        lengths = self._lengths(policy, batch, context, ratio, generator)
        longest, size = int(lengths.max()), choose_page_size([policy], None)
        pages, slack = pages_for(lengths, size), math.ceil(SLACK_STEPS / size) * lengths.numel()
        ragged = self.set_cache(policy, rows=batch, tokens=longest + SLACK_STEPS, pages=pages + slack)
        fill(ragged, lengths, generator, seen=context, marked=1.0 if policy.name == "streaming" else 1 - 1 / ratio)
        remember(ragged, context)
        mark_at(self.model, ratio)
        rings = sum(ring.numel() * ring.element_size() for ring in ragged.rings)
        return self._read_bytes(policy, lengths, size), pages * ragged.pool.page_bytes + rings

    def set_cache(self, policy: Policy, *, rows: int, tokens: int, pages: int) -> RaggedCache:
        """Replace the cache by an empty one."""
        self.cache.executor = Executor(self._empty(policy, 1, 1, pages=1), [], count_reads=False)  # free the last pool
        ragged = self._empty(policy, rows, tokens, pages=pages)
        self.cache.executor = Executor(ragged, [policy] * self.shape.layers, count_reads=policy.selects)
        return ragged

    def _lengths(self, policy: Policy, batch: int, context: int, ratio: float, generator: torch.Generator) -> Tensor:
        """int64 [layers, batch, kv_heads]: what each head holds."""
        shape, count, mean = self.shape, batch * self.shape.kv_heads, context / ratio
        if not isinstance(policy, DMSPolicy):
            held = policy.most_held(0, prompt=0, tokens=context) if policy.frees else context
            if policy.name == "snapkv":
                held = math.ceil(mean)
            return torch.full((shape.layers, batch, shape.kv_heads), held)
        longest = math.ceil(min(context, 8 * mean))
        draws = [spread_lengths(count, mean, longest, generator, least=self.window) for _ in range(shape.layers)]
        return torch.stack(draws).view(shape.layers, batch, shape.kv_heads)

    def _read_bytes(self, policy: Policy, lengths: Tensor, page_size: int) -> int:
        vector = self.shape.head_dim * self.dtype.itemsize
        if not isinstance(policy, QuestPolicy | DMSQuestPolicy):
            return 2 * int(lengths.sum()) * vector
        chosen = lengths[DENSE_LAYERS:]
        read = int(lengths[:DENSE_LAYERS].sum()) + int(chosen.clamp(max=policy.count * page_size).sum())
        return 2 * (read + pages_for(chosen, page_size)) * vector

    def _empty(self, policy: Policy, rows: int, tokens: int, *, pages: int) -> RaggedCache:
        return allocate(
            [policy] * self.shape.layers,
            self.head_shape,
            pages=pages,
            page_size=choose_page_size([policy], None),
            rows=rows,
            max_tokens=tokens,
            device=self.device,
        )


def mark_at(model: PreTrainedModel, ratio: float) -> None:
    """Mark a share 1 - 1 / ratio of tokens by chance: a normalised input under a unit weight is a normal number."""
    if ratio > 1:
        for head in heads(model):
            torch.nn.init.normal_(head.weight, std=head.weight.shape[1] ** -0.5)
            torch.nn.init.constant_(head.bias, NormalDist().inv_cdf(1 - 1 / ratio))


def kernel_times(step: Callable[[], Any], *, most: int, steps: int = 5) -> list[dict[str, Any]]:
    """The kernels that take most of a step: name, launches and milliseconds per step.

    A kernel may be there, waiting, before the one in front has ended: only what comes after that end counts.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    launches, microseconds = Counter[str](), Counter[str]()
    ended = 0.0
    on_device = (e for e in profiler.events() or () if e.device_type.name == "CUDA")
    for event in sorted(on_device, key=lambda e: e.time_range.end):
        name, span = event.name[:90], event.time_range
        launches[name] += 1
        microseconds[name] += max(span.end - max(span.start, ended), 0)
        ended = span.end
    return [
        {"kernel": name, "launches": launches[name] / steps, "ms": total / 1e3 / steps}
        for name, total in microseconds.most_common(most)
    ]
