"""Programmatic dependent launch (Hopper and later): a kernel is there, waiting, before the one in front has ended.

Every program of a kernel so launched waits before it reads what others wrote, or writes anything, and lets the next
kernel come only after that: then all that ended before the kernel in front began has ended here too, which the
compiler's own kernels rely on.
"""

from functools import cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsekv.ops.layout import interpreting


@cache
def follow(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    return device.type == "cuda" and not interpreting() and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict[str, Any]:
    """The launch option, where it exists."""
    return {"launch_pdl": True} if follow(device) else {}


@triton.jit
def take_turn():
    """Wait for the kernels in front, then let the next one be launched."""
    gdc_wait()
    gdc_launch_dependents()
