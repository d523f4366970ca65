"""What trained heads are compared with: the same numbers without what was learnt.

shuffled   the trained heads dealt out anew over all layers and KV heads: each still ranks tokens, for another head
random     directions drawn anew, each as long as the one it replaces: a ranking of tokens that nothing was learnt for
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekv.dms import EvictionHead


@torch.no_grad()
def shuffle_(heads: Sequence[EvictionHead], *, seed: int) -> None:
    """Permute the heads of all layers, in place."""
    weights, biases = _rows(heads)
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed)).to(weights.device)
    _write(heads, weights[order], biases[order])


@torch.no_grad()
def randomise_(heads: Sequence[EvictionHead], *, seed: int) -> None:
    """Replace each weight by a random one of its length, in place; biases stay."""
    weights, biases = _rows(heads)
    drawn = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed)).to(weights)
    _write(heads, drawn * (weights.norm(dim=1) / drawn.norm(dim=1))[:, None], biases)


CONTROLS: dict[str, Callable[..., None]] = {"shuffled": shuffle_, "random": randomise_}


def _rows(heads: Sequence[EvictionHead]) -> tuple[Tensor, Tensor]:
    """([all KV heads, hidden_size], [all KV heads])."""
    return torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])


def _write(heads: Sequence[EvictionHead], weights: Tensor, biases: Tensor) -> None:
    sizes = [len(head.bias) for head in heads]
    for head, weight, bias in zip(heads, weights.split(sizes), biases.split(sizes), strict=True):
        head.weight.copy_(weight)
        head.bias.copy_(bias)
