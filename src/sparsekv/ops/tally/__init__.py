from sparsekv.ops.tally.api import BACKENDS, tally

__all__ = ["BACKENDS", "tally"]
