from sparsekv.ops.prefill.api import prefill

__all__ = ["prefill"]
