"""Dynamic Memory Sparsification: each head learned which tokens it can forget (arXiv 2506.05345).

Token t takes the slot of token t - window if that one was marked, else it is appended. An offset on the logits dials
one set of heads to any ratio: -inf marks nothing (dense), +inf everything past the window.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sparsekv import dms
from sparsekv.policies.base import Policy, Step


class DMSPolicy(Policy):
    """sources: per layer, a function from hidden [T, hidden_size] to logits float32 [T, kv_heads]; None where the layer
    is not governed. lag: 0, or 1 for checkpoints in which the logit of token k + 1 decides token k."""

    name = "dms"

    def __init__(
        self,
        sources: Sequence[Callable[[Tensor], Tensor] | None],
        *,
        window: int = 64,
        lag: int = 0,
        offset: float = 0.0,
    ) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it counts the current token, so use at least 1")
        if lag not in (0, 1):
            raise ValueError(f"lag is {lag}; the logit of token k + lag decides token k, and lag is 0 or 1")
        self.sources = sources
        self.lag = lag
        self.offset = offset
        self._window = window

    def window(self, layer: int) -> int:
        return self._window

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """float32 [..., kv_heads], the offset included."""
        source = self.sources[layer]
        assert source is not None
        return source(hidden) + self.offset

    def marks(self, step: Step) -> Tensor:
        return dms.marks(self.logits(step.layer, step.hidden))
