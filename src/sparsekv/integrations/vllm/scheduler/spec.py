"""CreditSpec: a vLLM block as one page for every layer and KV head of a worker.

vLLM then sizes, limits and reports the cache in bytes that are true. The layers of a worker share one tensor, which is
the pool of pages; the first layer alone names its spec.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass(frozen=True, kw_only=True)
class CreditSpec(FullAttentionSpec):
    """num_kv_heads is the pages of a credit: layers times KV heads, of the largest pipeline stage. The rest is what the
    manager must know, which gets no other configuration."""

    rows: int
    """Requests at once."""
    workers: int
    """How many report: tensor times pipeline parallel."""
    ratio: float
    window: int
    most: int | None
    """As in settings.Method."""
    trusted_ratio: float

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """For one sequence of max_model_len tokens, densely, so that a lone one always ends; less where a ratio is
        trusted: then what it holds, and all tokens of the steps that no worker has reported yet, of which there are up
        to twice as many as run at once, as a report comes with a later step's. One block is vLLM's own, as padding."""
        tokens = vllm_config.model_config.max_model_len
        if self.trusted_ratio > 1:
            held = int(tokens / self.trusted_ratio) + self.window + self.block_size // 2
            tokens = min(tokens, held + 2 * vllm_config.max_in_flight_tokens)
        return (-(-tokens // self.block_size) + 1) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """All layers, of which only one is asked, have one spec."""
        assert all(spec == specs[0] for spec in specs)
        return specs[0]


def expected_tokens(spec: Any, tokens: int) -> int:
    """Tokens that a head is expected to hold of `tokens`."""
    held = max(min(tokens, spec.window), int(-(-tokens // max(spec.ratio, spec.trusted_ratio))))
    return held if spec.most is None else min(held, spec.most)
