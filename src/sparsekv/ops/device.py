"""What a device has: the numbers that kernels are cut by, asked for once, and the memory that is free now."""

from functools import cache

import psutil
import torch


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where kernels run in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**20


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor may take; on a GPU with what PyTorch's allocator holds unused and can give back."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    held = torch.cuda.memory_stats(device)
    idle = held["reserved_bytes.all.current"] - held["allocated_bytes.all.current"]
    return torch.cuda.mem_get_info(device)[0] + idle - held["inactive_split_bytes.all.current"]
