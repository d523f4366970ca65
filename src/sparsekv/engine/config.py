"""EngineConfig: how large the engine is. Names follow vLLM's."""

from dataclasses import dataclass

from sparsekv.engine.checks import check_int, check_number


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
        if isinstance(self.kv_memory, float):
            check_number("kv_memory as a fraction", self.kv_memory, low=0.0, high=1.0)
