from sparsekv.ops.decode.api import decode

__all__ = ["decode"]
