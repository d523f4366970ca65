"""upload and download: host data to the device and back without waiting for it."""

import torch
from torch import Tensor


def upload(data: list | tuple | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values; data: numbers, nested alike, or a tensor on the host."""
    if device.type != "cuda":
        return torch.as_tensor(data, dtype=dtype, device=device)
    host = torch.as_tensor(data, dtype=dtype)
    return (host if host.is_pinned() else host.pin_memory()).to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A copy on the host. From a GPU it is only begun: an event recorded behind it tells when it may be read."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
