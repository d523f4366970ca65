"""sparsekv: a KV cache that is really smaller, because every attention head learns which tokens it can forget.

The public names below are imported on first use. Importing this package loads neither torch nor transformers, patches
nothing and changes nothing global.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.assets.embedded import fetch_model as fetch_model
    from sparsekv.cache.stats import KVStats as KVStats
    from sparsekv.engine import LLM as LLM
    from sparsekv.engine import SamplingParams as SamplingParams
    from sparsekv.modeling.attach import Attachment as Attachment
    from sparsekv.modeling.attach import attach as attach
    from sparsekv.modeling.attach import detach as detach
    from sparsekv.modeling.attach import heads as heads
    from sparsekv.modeling.cache import SparseCache as SparseCache
    from sparsekv.modeling.tracing.trace import Trace as Trace
    from sparsekv.modeling.tracing.trace import inspect as inspect

__version__ = "0.1.0"

_HOMES = {
    "LLM": "sparsekv.engine",
    "SamplingParams": "sparsekv.engine",
    "SparseCache": "sparsekv.modeling.cache",
    "attach": "sparsekv.modeling.attach",
    "detach": "sparsekv.modeling.attach",
    "heads": "sparsekv.modeling.attach",
    "Attachment": "sparsekv.modeling.attach",
    "inspect": "sparsekv.modeling.tracing.trace",
    "Trace": "sparsekv.modeling.tracing.trace",
    "fetch_model": "sparsekv.assets.embedded",
    "KVStats": "sparsekv.cache.stats",
}


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return import_module("sparsekv.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsekv' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
