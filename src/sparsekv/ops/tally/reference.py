"""tally in plain PyTorch: the oracle, and the CPU path."""

import torch
from torch import Tensor


def tally(lengths: Tensor, seen: Tensor, free_count: Tensor, page_size: int) -> Tensor:
    """See api.tally."""
    by_row = lengths.transpose(0, 1).flatten(1)
    table = torch.zeros(len(by_row) + 1, 2 + page_size, dtype=torch.int32, device=lengths.device)
    table[:-1, 0] = seen[0]
    table[:-1, 1] = ((by_row + (page_size - 1)) // page_size).sum(1, dtype=torch.int32)
    table[:-1, 2:].scatter_add_(1, (by_row % page_size).long(), torch.ones_like(by_row))
    table[-1, 0] = free_count[0]
    return table
