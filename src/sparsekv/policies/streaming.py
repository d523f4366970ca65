"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453).

Every token but the first `sinks` is marked, with a window of budget - sinks: token t takes the slot of the oldest
non-sink. A sliding-window layer of a model is the same with no sinks.
"""

from torch import Tensor

from sparsekv.ops.layout import LaterMarks
from sparsekv.policies.base import Policy, Step


class StreamingPolicy(Policy):
    """Holds `budget` tokens per head: the first `sinks` and the most recent others."""

    name = "streaming"

    def __init__(self, *, budget: int, sinks: int = 4) -> None:
        for name, value in (("budget", budget), ("sinks", sinks)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}; it counts tokens, so use an integer")
        if sinks < 0:
            raise ValueError(f"sinks is {sinks}; it must be 0 or more")
        if budget <= sinks:
            raise ValueError(f"budget {budget} leaves no recent window beside {sinks} sinks; use at least {sinks + 1}")
        self.budget = budget
        self.sinks = sinks

    def window(self, layer: int) -> int:
        return self.budget - self.sinks

    def most_held(self, layer: int, *, prompt: int, tokens: int) -> int:
        return min(tokens, self.budget)

    def most_in_prompt(self, layer: int, tokens: int) -> int:
        return min(tokens, self.budget)

    def marks(self, step: Step) -> Tensor:
        return (step.positions >= self.sinks)[:, None].expand(-1, step.key.shape[1])

    def decode_marks(self, step: Step) -> LaterMarks:
        return LaterMarks(first=self.sinks)


class SlidingWindowPolicy(StreamingPolicy):
    """A model's own sliding-window layer: query q sees keys with q - k < window."""

    name = "sliding-window"

    def __init__(self, window: int) -> None:
        super().__init__(budget=window, sinks=0)
