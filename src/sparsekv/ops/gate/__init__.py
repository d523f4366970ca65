from sparsekv.ops.gate.api import gate

__all__ = ["gate"]
