"""A budget of thought: after `tokens` tokens without the end marker, the marker is forced, and the answer follows.

The rule for the sample's j-th token looks at no token that may be in flight, so it is the same whether steps overlap
or not: the marker's last token is banned at j = tokens - 1, so that the marker cannot end there, and the marker is
forced from j = tokens on; both unless the output held it before.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekv.engine.checks import check_int

if TYPE_CHECKING:
    from sparsekv.engine.schedule.request import Sequence


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    """Raises ValueError for a budget below 0 or a marker without tokens."""

    tokens: int
    """Tokens of thought at most, the end marker not counted."""
    end: tuple[int, ...]
    """The end marker's token ids."""

    def __post_init__(self) -> None:
        check_int("tokens of a thinking budget", self.tokens, at_least=0)
        if not self.end:
            raise ValueError("the thinking budget's end marker has no tokens; give the ids of a text such as </think>")
        for token in self.end:
            check_int("a token of the end marker", token, at_least=0)

    def banned(self, sample: "Sequence") -> int | None:
        """The token that may not be the sample's next."""
        if sample.sampled != self.tokens - 1 or self._closed(sample, self.tokens - 2):
            return None
        return self.end[-1]

    def forced(self, sample: "Sequence") -> int | None:
        """The token that must be the sample's next."""
        at = sample.sampled - self.tokens
        if not 0 <= at < len(self.end) or self._closed(sample, self.tokens - 1):
            return None
        return self.end[at]

    def _closed(self, sample: "Sequence", count: int) -> bool:
        """Whether its first `count` tokens hold the marker."""
        start, length = len(sample.request.prompt), len(self.end)
        tokens = sample.tokens[start : start + max(count, 0)]
        return any(tuple(tokens[i : i + length]) == self.end for i in range(len(tokens) - length + 1))
