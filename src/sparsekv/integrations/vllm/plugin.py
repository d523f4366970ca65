"""What vLLM is told: a load format, a cache spec with its manager, an attention backend."""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

from vllm.model_executor.model_loader import register_model_loader
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparsekv.integrations.vllm.scheduler.manager import CreditManager
from sparsekv.integrations.vllm.scheduler.spec import CreditSpec
from sparsekv.integrations.vllm.worker.loader import SparseLoader

LOAD_FORMAT = "sparsekv"
_BACKEND = "sparsekv.integrations.vllm.worker.backend.SparseBackend"
_registered = False


def register_parts() -> None:
    """Once a process, however often vLLM asks."""
    global _registered
    if _registered:
        return
    _registered = True
    register_all_kvcache_specs(None)  # vLLM's own, which it registers only into an empty registry
    KVCacheSpecRegistry.register(CreditSpec, CreditManager, uniform_type_base_spec=FullAttentionSpec)
    register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    register_model_loader(LOAD_FORMAT)(SparseLoader)
