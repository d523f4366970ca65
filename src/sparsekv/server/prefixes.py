"""Prefix reuse: a chat's next turn, or another chat with the same system message, goes on from what is stored.

What is stored is a finished sample's cache as the engine keeps it: pages as they are, lengths, and the evictions that
are still pending. A prompt goes on from the longest one whose tokens it begins with, all of them or not at all, and
only where the same text read anew would come to the same: the policy neither prunes a finished prompt nor chooses what
to read, and the dial has not been turned since.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import Session
from sparsekv.engine.params import SamplingParams
from sparsekv.modeling.attach import attachment_of

LEAST = 16
"""Tokens of a prefix worth keeping."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    session: Session
    epoch: int
    """Turns of the dial when it was made."""

    @property
    def bytes(self) -> int:
        return self.session.state.bytes


class Prefixes:
    """limit: bytes of host memory; what was used longest ago goes first."""

    def __init__(self, llm: LLM, *, limit: int) -> None:
        self.llm, self.limit = llm, limit
        policies = [layer.policy for layer in attachment_of(llm.model).layers]
        self.usable = limit > 0 and not any(policy.prunes or policy.selects for policy in policies)
        self.bytes = 0
        self.asked = self.found = 0
        """Prompt tokens that were looked up, and those that were stored."""
        self._kept: OrderedDict[tuple[int, ...], Kept] = OrderedDict()

    def find(self, ids: list[int], *, epoch: int) -> Session | None:
        """The longest stored text that `ids` begin with and go beyond."""
        if not self.usable:
            return None
        self.asked += len(ids)
        best: tuple[int, ...] = ()
        for tokens, kept in self._kept.items():
            if len(best) < len(tokens) < len(ids) and kept.epoch == epoch and tokens == tuple(ids[: len(tokens)]):
                best = tokens
        if not best:
            return None
        self._kept.move_to_end(best)
        self.found += len(best)
        return self._kept[best].session

    def keep(self, session: Session, *, epoch: int) -> None:
        """Store what is in a finished sample's cache."""
        tokens = tuple(session.tokens[: session.placed])
        if not self.usable or len(tokens) < LEAST or session.state.bytes > self.limit:
            return
        self._drop(tokens)
        self._kept[tokens] = Kept(session=replace(session, tokens=list(tokens)), epoch=epoch)
        self.bytes += session.state.bytes
        while self.bytes > self.limit:
            self._drop(next(iter(self._kept)))

    async def prepare(self, prefix: list[int], *, epoch: int, request_id: str) -> None:
        """Read a prefix that other prompts share and store it, unless it is stored."""
        known = self._kept.get(tuple(prefix))
        if not self.usable or len(prefix) < LEAST or (known is not None and known.epoch == epoch):
            return
        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        async for output in self.llm.stream(prefix, params, request_id=f"{request_id}-prefix", keep=True):
            if output.session is not None:
                self.keep(output.session, epoch=epoch)

    def _drop(self, tokens: tuple[int, ...]) -> None:
        kept = self._kept.pop(tokens, None)
        if kept is not None:
            self.bytes -= kept.bytes
