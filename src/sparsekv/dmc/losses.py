"""The pull towards the target ratio, and how fast that rises.

L = language-model loss per token + mean over texts of max(0, target - fraction of merges), target = 1 - 1 / CR(step).
One-sided, weight 1. The fraction is over a text's layers, heads and tokens, of hard decisions with the gradient of
alpha (straight-through).

CR(step) is `dms.compression_ratio`: the original rises linearly from 1 to CR over `train_iters` steps, that is by one
every train_iters / (CR - 1), and then trains a third of that again with CR held. Its script has 6,000 + 2,000 steps of
1,024 x 4,096 tokens, 35 billion; its README calls that the run for CR 2 and says that the number grows linearly with
CR, while the script's own target is the default, 4. Which of the two made the published models is not verified.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekv import dms


def straight_through(alpha: Tensor) -> Tensor:
    """The hard decision alpha > 1/2 as 0 or 1, with the gradient of alpha. Any shape."""
    return (alpha > 0.5).to(alpha.dtype) - alpha.detach() + alpha


def compression_loss(alphas: Sequence[Tensor], target: float | Tensor) -> Tensor:
    """max(0, target - fraction of merges), a mean over texts.

    alphas: of each layer [B, S, H], whose heads may differ in number but not too much: layers weigh the same, as in the
    original. target: `dms.target_fraction(ratio)`. Returns a scalar. Each text's first decision counts, idle as it is.
    """
    fraction = torch.stack([straight_through(alpha).mean(dim=(1, 2)) for alpha in alphas]).mean(0)
    return dms.hinge(fraction, target).mean()
