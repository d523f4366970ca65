"""What each step of a retrofit aims at: the rising ratio and, once it is reached, what `hold` says."""

import numpy as np

from sparsekv import dmc, dms
from sparsekv.retrofit.config import RetrofitConfig


def step_target(config: RetrofitConfig, step: int) -> tuple[float, float | None]:
    """(the fraction of marks to reach at a step, counted from 1; None, or the fraction that the unshifted logits are
    trained to where the step's own ratio is drawn below it, each octave as often, and the logits are shifted to it)."""
    ratio = dms.compression_ratio(
        max(step - config.fade_steps, 0), steps_per_cr=config.steps_per_cr, max_cr=config.max_cr
    )
    full = dms.target_fraction(ratio)
    if config.hold == "max" or step <= config.steps_to(config.max_cr):
        return full, None
    return dms.target_fraction(ratio ** np.random.default_rng((config.seed, step)).random()), full


def channel_kept(config: RetrofitConfig, step: int) -> float | None:
    """The share of a neuron source's channel that attention still sees: 1 - t / fade_steps, for DMC nothing over the
    last fifth; None after that stage."""
    if step > config.fade_steps:
        return None
    return dmc.neuron_keep(step, steps=config.fade_steps) if config.policy == "dmc" else 1 - step / config.fade_steps


class Progress:
    """Raises ValueError where the fraction of marks does not rise. patience: in steps."""

    RISE, BELOW = 1e-3, 0.05

    def __init__(self, patience: int) -> None:
        self.patience, self.fractions = patience, list[float]()

    def check(self, fraction: float, target: float) -> None:
        """To be called at every step that pulls the unshifted logits."""
        self.fractions.append(fraction)
        if len(self.fractions) <= self.patience:
            return
        before = self.fractions.pop(0)
        if fraction - before < self.RISE and target - fraction > self.BELOW:
            raise ValueError(
                f"the fraction of marks does not move: {before:.4f} {self.patience} steps ago, {fraction:.4f} now, and "
                f"the target is {target:.2f}; raise lr, or stall_steps where the model needs longer"
            )
