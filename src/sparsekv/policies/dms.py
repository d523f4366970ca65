"""Dynamic Memory Sparsification: each head learned which tokens it can forget (arXiv 2506.05345).

Token t takes the slot of token t - window if that one was marked, else it is appended. An offset on the logits dials
one set of heads to any ratio: -inf marks nothing (dense), +inf everything past the window.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekv import dms
from sparsekv.ops.layout import LinearMarks
from sparsekv.policies.base import Policy, Step


class DMSPolicy(Policy):
    """Each head learned which tokens it can forget, and forgets them when they leave the window.

    sources: per layer, a function from hidden [T, hidden_size] to logits float32 [T, kv_heads]; None where the layer
    is not governed. lag: 0, or 1 for checkpoints in which the logit of token k + 1 decides token k; or the window, for
    comparisons without a cache: what is decided about a token that leaves the window takes effect at once.
    """

    name = "dms"
    trained = True

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
        if lag not in (0, 1, window):
            raise ValueError(f"lag is {lag}; the logit of token k + lag decides token k: use 0, 1 or the window")
        self.sources = sources
        self.lag = lag
        self._offset = float(offset)
        self._offsets: dict[torch.device, Tensor] = {}
        self._window = window

    @property
    def offset(self) -> float:
        """Added to every logit. Assigning it takes effect from the next forward on, also in recorded CUDA graphs."""
        return self._offset

    @offset.setter
    def offset(self, value: float) -> None:
        self._offset = float(value)
        for tensor in self._offsets.values():
            tensor.fill_(self._offset)

    def offset_on(self, device: torch.device) -> Tensor:
        """The offset as a tensor float32 [1], the same one at every call: kernels and graphs may keep it."""
        if device not in self._offsets:
            with torch.inference_mode(False):  # so that a later assignment may write to it
                made = torch.tensor([self._offset], dtype=torch.float32, device=device)
            self._offsets.setdefault(device, made)  # one for all threads
        return self._offsets[device]

    def window(self, layer: int) -> int:
        return self._window

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """float32 [..., kv_heads], the offset included."""
        source = self.sources[layer]
        assert source is not None
        return source(hidden) + self.offset_on(hidden.device)

    def marks(self, step: Step) -> Tensor:
        return dms.marks(self.logits(step.layer, step.hidden))

    def decode_marks(self, step: Step) -> Tensor | LinearMarks:
        source = self.sources[step.layer]
        if self.lag or not isinstance(source, dms.EvictionHead):
            return self.marks(step)
        offset = self.offset_on(step.hidden.device)
        return LinearMarks(hidden=step.hidden, weight=source.weight, bias=source.bias, offset=offset)
