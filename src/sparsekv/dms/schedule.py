"""How fast the target ratio rises: CR(step) = 1 + step / steps_per_cr, up to the last ratio (arXiv 2506.05345, 3.2)."""


def compression_ratio(step: int, *, steps_per_cr: int, max_cr: float) -> float:
    """The target compression ratio at an optimiser step: 1 at step 0, one more every `steps_per_cr` steps."""
    return min(1 + step / steps_per_cr, max_cr)


def target_fraction(ratio: float) -> float:
    """The share of tokens that must be marked to hold 1 / ratio of them: 1 - 1 / CR."""
    return 1 - 1 / ratio
