from sparsekv.ops.draw.api import draw

__all__ = ["draw"]
