from sparsekv.ops.bounds.api import refresh, refresh_written, select

__all__ = ["refresh", "refresh_written", "select"]
