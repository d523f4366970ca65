"""EngineConfig: how large the engine is. Names follow vLLM's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from sparsekv.engine.checks import check_int, check_number

ELSEWHERE = {
    "gpu_memory_utilization": "kv_memory=0.5 takes half of the free memory for the pool",
    "tensor_parallel_size": "an engine runs on one GPU",
    "pipeline_parallel_size": "an engine runs on one GPU",
    "quantization": "load a quantised model and pass it",
    "kv_cache_dtype": "keys and values have the model's type",
    "block_size": "its name here is page_size",
    "enable_prefix_caching": "keep=True and session=... continue a text",
    "trust_remote_code": "load such a model and pass it",
}
"""vLLM's names for what is otherwise here."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ValueError, one sentence that names the field, for values out of range."""

    kv_memory: int | str | float | None = None
    """The pool: bytes, text like "2GiB", or a fraction of the free memory up to 1.0 (a float). None = 0.9 of it on a
    GPU and 0.5 on a CPU, and never more than max_num_seqs full contexts need."""
    page_size: int | None = None
    """Token slots per page; None = what the policy needs, else 32."""
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 8192
    """Tokens of one step: a token of each running sequence, and chunks of prompts."""
    max_model_len: int | None = None
    """Tokens of one sequence, prompt and output; None = the model's context."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs."""
    async_scheduling: bool | None = None
    """Give the device the next step before the last one's tokens are read; None = on a GPU."""

    def __post_init__(self) -> None:
        if self.page_size is not None:
            check_int("page_size", self.page_size, at_least=1)
        check_int("max_num_seqs", self.max_num_seqs, at_least=1)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, at_least=1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "each running sequence takes a token of every step; raise the one or lower the other"
            )
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, at_least=2)
        for name in ("enforce_eager", "async_scheduling"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use True or False")
        if isinstance(self.kv_memory, float):
            check_number("kv_memory as a fraction", self.kv_memory, low=0.0, high=1.0)


def check_options(names: Iterable[str], *, policy: Sequence[str]) -> None:
    """What LLM was given beside its own arguments. policy: the options of the policy that was named.

    Raises ValueError for what neither the engine nor the policy knows.
    """
    engine = [f.name for f in fields(EngineConfig)]
    unknown = sorted(set(names) - {*engine, *policy})
    if unknown:
        hints = "".join(f"; {ELSEWHERE[name]}" for name in unknown if name in ELSEWHERE)
        raise ValueError(f"LLM does not know {', '.join(unknown)}{hints}; it takes {', '.join([*engine, *policy])}")
