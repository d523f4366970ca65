"""Where a step's rows lie on the device, in places that never move, so that CUDA graphs can read them.

A graph of a step of decodes is recorded for a number of requests, as vLLM hands it out. One that also has chunks of
prompts is recorded for a number of tokens alone (vLLM's PIECEWISE mode): which tokens are whose is read at run time.
There every request has a place among the decodes and one among the chunks, and is -1 in one of them.
"""

import torch
from torch import Tensor

from sparsekv.attend import Part
from sparsekv.integrations.vllm.worker.fill import BEYOND, Step, Target, fill
from sparsekv.ops.layout import Batch


class StepBuffers:
    """requests: at once; places: at least those, and as many as a graph of decodes may be padded to; max_tokens: of any
    sequence."""

    def __init__(self, *, requests: int, places: int, max_tokens: int, device: torch.device) -> None:
        self.requests = requests
        self.max_tokens = max_tokens
        self._single = torch.arange(places + 1, dtype=torch.int32, device=device)
        """Starts of sequences of one token."""
        # With a place more, for the tokens that a graph is padded by: they belong to no request.
        self._step = Target(
            rows=torch.full((places,), -1, dtype=torch.int64, device=device),
            seen=torch.zeros(places + 1, dtype=torch.int32, device=device),
            split=torch.full((2, requests + 1), -1, dtype=torch.int64, device=device),
            starts=torch.full((requests + 2,), BEYOND, dtype=torch.int32, device=device),
        )
        self._step.starts[0] = 0

    def fill(self, step: Step) -> None:
        """Take in a step. It may be padded to `places` where all are decodes."""
        fill(step, self._step)

    def empty(self) -> None:
        """The step is over. A graph that vLLM runs without a step, for ranks that have none, then does nothing."""
        self._step.split.fill_(-1)

    def decodes(self, count: int) -> Part:
        """The first `count` requests."""
        batch = Batch(rows=self._step.rows[:count], starts=self._single[: count + 1], longest=1)
        return Part(batch=batch, seen=self._step.seen[:count], tokens=count, most=self.max_tokens)

    def chunks(self, starts: Tensor, first: int, *, longest: int, tokens: int) -> Part:
        """The requests from `first` on; starts: int32, theirs and the end, among the step's tokens."""
        end = first + len(starts) - 1
        # At least 2: a chunk of one token among longer ones is still no decode step.
        batch = Batch(rows=self._step.rows[first:end], starts=starts - starts[0], longest=max(2, longest))
        return Part(batch=batch, seen=self._step.seen[first:end], tokens=tokens, most=self.max_tokens)

    def recorded(self, tokens: int) -> tuple[Part, Part]:
        """Any step of at most `tokens` tokens: its decodes, which are its first tokens, and its chunks, over all."""
        count = min(tokens, self.requests)
        rows, starts = self._step.split, self._step.starts[: count + 2].clamp(max=tokens)
        decodes = Batch(rows=rows[0, :count], starts=self._single[: count + 1], longest=1)
        chunks = Batch(rows=rows[1, : count + 1], starts=starts, longest=max(2, tokens))
        return (
            Part(batch=decodes, seen=self._step.seen[:count], tokens=count, most=self.max_tokens),
            Part(batch=chunks, seen=self._step.seen[: count + 1], tokens=tokens, most=self.max_tokens),
        )
