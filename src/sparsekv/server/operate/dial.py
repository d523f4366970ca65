"""The dial of trained heads while the server runs: turned by hand within bounds, or by the pool's own pressure.

Under pressure (--adaptive-cr LOW:HIGH) the ratio goes up a step as free pages fall below a share of the pool or samples
wait in host memory, and down again a step when most of the pool is free. What is stored stays stored: a higher ratio
makes heads forget more of what comes.
"""

from dataclasses import dataclass

from sparsekv.engine.llm import LLM
from sparsekv.modeling.dial import serves

SHORT, AMPLE = 0.15, 0.5
"""Parts of the pool's pages that are free."""
STEPS = 8
"""From one bound to the other."""
PAUSE = 0.5
"""Seconds between two looks."""


@dataclass(kw_only=True)
class Dial:
    """llm: with an adapter; cr: where it stands; tokens: the length that ratios are meant for, None = the table's.

    Raises ValueError for bounds that the adapter does not reach, or that do not hold cr.
    """

    llm: LLM
    cr: float
    low: float = 1.0
    high: float
    tokens: int | None = None
    adaptive: bool = False
    turned: int = 0
    """Changes so far."""

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.cr <= self.high:
            raise ValueError(f"the ratio {self.cr:g} is not between {self.low:g} and {self.high:g}; choose others")
        if not serves(self.high, most=self.llm.max_cr):
            raise ValueError(f"the adapter holds ratios up to {self.llm.max_cr:g}, not {self.high:g}; lower the bound")

    def turn(self, cr: float) -> None:
        """From the next step on. Raises ValueError outside the bounds."""
        if not self.low <= cr <= self.high:
            raise ValueError(f"the ratio is {cr:g}; use a number from {self.low:g} to {self.high:g}")
        if cr != self.cr:
            self.llm.between_steps(lambda: self.llm.set_cr(cr, tokens=self.tokens))
            self.cr = cr
            self.turned += 1

    def follow_pressure(self) -> None:
        """One look at the pool, and at most one step."""
        scheduler = self.llm.engine.scheduler
        free, step = scheduler.ledger.free / scheduler.ledger.pages, (self.high - self.low) / STEPS
        if free < SHORT or scheduler.swapped:
            self.turn(min(self.high, self.cr + step))
        elif free > AMPLE:
            self.turn(max(self.low, self.cr - step))


def bounds(text: str) -> tuple[float, float]:
    """(4.0, 8.0) from "4:8". Raises ValueError for anything else."""
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = 0.0, 0.0
    if not 1 <= found[0] < found[1] < float("inf"):
        raise ValueError(f"adaptive-cr is {text!r}; write two ratios of 1 or more, the lower first, such as 4:8")
    return found
