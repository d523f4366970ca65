"""upload: host data to the device without waiting for it."""

import torch
from torch import Tensor


def upload(data: list | tuple | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values; data: numbers, nested alike, or a tensor on the host."""
    if device.type != "cuda":
        return torch.as_tensor(data, dtype=dtype, device=device)
    host = torch.as_tensor(data, dtype=dtype)
    return (host if host.is_pinned() else host.pin_memory()).to(device, non_blocking=True)
