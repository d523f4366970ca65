"""What the user chose, as it travels in vLLM's `additional_config`, which is part of the key of its compile cache."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from sparsekv.modeling.adapter import AdapterConfig, LoadedAdapter, load_adapter
from sparsekv.modeling.queries.neuron import as_read
from sparsekv.policies import Policy, make_policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.streaming import StreamingPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEY = "sparsekv"
"""Of additional_config."""
PAGE_SIZE = 32
"""Slots of a page, and vLLM's block size."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """adapter, with cr and tokens as in sparsekv.attach; or policy "streaming" with budget and sinks."""

    adapter: str | None = None
    """A folder that every worker can read, or a hub id."""
    cr: float | None = None
    tokens: int | None = None
    policy: str = "dms"
    budget: int | None = None
    sinks: int = 4
    trusted_ratio: float = 1.0
    """The ratio that a lone sequence of max_model_len tokens is promised to have. 1 = none: a context is then as long
    as the pool holds it densely, and one that fits at the start always ends."""

    def __post_init__(self) -> None:
        if self.policy not in ("dms", "streaming"):
            raise ValueError(f"policy is {self.policy!r}; in vLLM it can be 'dms', with an adapter, or 'streaming'")
        if self.policy == "dms" and (self.adapter is None or self.budget is not None):
            raise ValueError("policy 'dms' takes trained heads and no budget: pass adapter=..., and cr=... for a ratio")
        if self.policy == "streaming":
            if self.adapter is not None or self.cr is not None or self.tokens is not None:
                raise ValueError("policy 'streaming' takes budget=... and sinks=..., no adapter, cr or tokens")
            if self.budget is None:
                raise ValueError("policy 'streaming' needs budget=..., the tokens that each head may hold")
            StreamingPolicy(budget=self.budget, sinks=self.sinks)  # raises for numbers that do not fit
        if self.tokens is not None and self.cr is None:
            raise ValueError("tokens is the length that cr is meant for; pass cr=... beside it")
        if not self.trusted_ratio >= 1:
            raise ValueError(f"trusted_ratio is {self.trusted_ratio}; it divides what a context takes: use 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, what is not the default alone."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


def read_settings(additional_config: Any) -> Settings:
    """Raises ValueError where there is nothing for sparsekv, or an unknown key."""
    raw = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if not isinstance(raw, dict):
        raise ValueError(
            "load format 'sparsekv' needs --additional-config; take all arguments from `sparsekv vllm-args` or "
            "sparsekv.integrations.vllm.engine_args"
        )
    unknown = sorted(set(raw) - {f.name for f in fields(Settings)})
    if unknown:
        raise ValueError(f"additional_config's {KEY!r} has unknown keys: {', '.join(unknown)}")
    return Settings(**raw)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The settings, resolved against a model."""

    settings: Settings
    loaded: LoadedAdapter | None
    ratio: float
    """Expected of a long sequence: for admission alone, never for what is held."""
    window: int
    most: int | None
    """Tokens that a head holds at most, if there is such a bound."""


def resolve(settings: Settings, config: "PreTrainedConfig") -> Method:
    """Read and check what the settings name, for a model of this configuration.

    Raises ValueError for an adapter of another model, one with LoRA that is not merged, or one that the plugin cannot
    run (lag beyond 1, DMC).
    """
    if settings.policy == "streaming":
        assert settings.budget is not None
        return Method(
            settings=settings, loaded=None, ratio=1.0, window=settings.budget - settings.sinks, most=settings.budget
        )
    assert settings.adapter is not None
    loaded = load_adapter(settings.adapter, config)
    _check_adapter(settings.adapter, loaded.config)
    if settings.cr is not None:
        loaded.config.offset_for(settings.cr, tokens=settings.tokens)  # raises where the table does not reach it
    ratio = settings.cr or loaded.config.max_cr
    return Method(
        settings=settings,
        loaded=loaded,
        ratio=1.0 if math.isnan(ratio) else ratio,
        window=loaded.config.window,
        most=None,
    )


def make(method: Method, heads: list[Any], *, device: torch.device) -> Policy:
    """The policy of a worker's layers; heads: by layer, an EvictionHead of the worker's own KV heads, or None."""
    settings = method.settings
    if method.loaded is None:
        return make_policy("streaming", budget=settings.budget, sinks=settings.sinks)
    config = method.loaded.config
    offset = 0.0 if settings.cr is None else config.offset_for(settings.cr, tokens=settings.tokens)
    sources = [as_read if head is None else head for head in heads]
    policy = DMSPolicy(sources, window=config.window, lag=config.lag, offset=offset)
    policy.offset_on(device)  # made before any CUDA graph is recorded
    return policy


def _check_adapter(name: str, config: AdapterConfig) -> None:
    if config.r:
        raise ValueError(
            f"the adapter {name} has LoRA, which vLLM must find in the weights: run `sparsekv convert merged {name} "
            "DST`, then serve DST/model with the adapter DST"
        )
    if config.policy != "dms":
        raise ValueError(f"the adapter {name} is for policy {config.policy!r}; vLLM runs 'dms' alone")
    if config.lag not in (0, 1):
        raise ValueError(f"the adapter {name} has lag {config.lag}; vLLM runs lag 0 and 1, and sparsekv.LLM any")
