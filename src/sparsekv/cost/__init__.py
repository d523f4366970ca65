"""What a decode step costs before it is run: FLOPs, bytes, seconds, memory, energy (arXiv 2506.05345's cost model).

Arithmetic alone: uses nothing else of sparsekv, and no framework.
"""

from sparsekv.cost.fit import Limits, chains, largest_batch, largest_context
from sparsekv.cost.hardware import HARDWARE, Hardware, hardware_of
from sparsekv.cost.measured import Measured, against_measured
from sparsekv.cost.model import bytes_read, flops, kv_bytes, step_seconds, weight_bytes
from sparsekv.cost.plan import MAX_CONTEXT, Plan, Rates, plan
from sparsekv.cost.shapes import ALIASES, SHAPES, ModelShape, shape_from_config, shape_of

__all__ = [
    "ALIASES",
    "HARDWARE",
    "MAX_CONTEXT",
    "SHAPES",
    "Hardware",
    "Limits",
    "Measured",
    "ModelShape",
    "Plan",
    "Rates",
    "against_measured",
    "bytes_read",
    "chains",
    "flops",
    "hardware_of",
    "kv_bytes",
    "largest_batch",
    "largest_context",
    "plan",
    "shape_from_config",
    "shape_of",
    "step_seconds",
    "weight_bytes",
]
