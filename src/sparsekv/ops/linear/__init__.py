from sparsekv.ops.linear.api import linear, workspace_for

__all__ = ["linear", "workspace_for"]
