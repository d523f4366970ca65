from sparsekv.ops.weigh.api import weigh

__all__ = ["weigh"]
