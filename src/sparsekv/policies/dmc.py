"""Dynamic Memory Compression: each head learned which tokens merge into the slot before theirs (arXiv 2403.09636).

Token t is appended, or takes the slot of token t - 1 and leaves there the importance-weighted mean of all tokens merged
into it: DMS with window 1 and lag 1, and keys and values that are running means. Means are of keys before RoPE and are
turned at the position of their newest token. An offset on the logits dials one checkpoint to any ratio.

The original keeps, at inference too, the last 12 tokens of each head, and what is older leaves the mean. Here only
training reaches back so far (`reach`): the means of the cache are of the whole segment, which is the same for segments
of up to 12 tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekv import dmc, dms
from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.layout import LayerPages
from sparsekv.policies.base import Step
from sparsekv.policies.dms import DMSPolicy


class DMCPolicy(DMSPolicy):
    """Each head learned which tokens it can merge into the newest one it holds, as a weighted mean.

    sources: per layer, a function from hidden, a packed dmc.BeforeRope, to logits float32 [T, kv_heads]; None where
    the layer is not governed. reach: tokens that a mean reaches back in training.
    """

    name = "dmc"
    pads_chunks = False

    def __init__(
        self, sources: Sequence[Callable[[Tensor], Tensor] | None], *, reach: int = 12, offset: float = 0.0
    ) -> None:
        if reach < 1:
            raise ValueError(f"reach is {reach}; it counts the current token, so use at least 1")
        super().__init__(sources, window=1, lag=1, offset=offset)
        self.reach = reach

    def state(self, shape: HeadShape) -> list[State]:
        """The last slot of each row, see dmc.Carry."""
        mean = (shape.kv_heads, shape.dim)
        return [
            State(name="z", kind="row", shape=mean[:1], dtype=shape.wide),
            State(name="key", kind="row", shape=mean, dtype=shape.wide),
            State(name="value", kind="row", shape=mean, dtype=shape.wide),
        ]

    def store(self, step: Step, pages: LayerPages) -> tuple[Tensor, Tensor]:
        rows, state, batch = step.batch.rows, step.state.row, step.batch
        read = dmc.BeforeRope.unpack(step.hidden, *step.key.shape[1:])
        merge = dms.marks(read.merge + self.offset_on(read.merge.device))
        carry = dmc.Carry(*(state[name][rows] for name in dmc.Carry._fields))
        key, value, carry = dmc.accumulate(
            read.key, step.value, read.importance, merge, carry, starts=batch.starts, longest=batch.longest
        )
        for name, last in carry._asdict().items():
            state[name][rows] = last
        return dmc.rotate(key, read.cos, read.sin).to(step.key.dtype), value

    def means(
        self, step: Step, log_open: Tensor, *, rows: int, soft: bool, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What stands in for keys and values, [T, H, D], where all of the texts is at hand and nothing is stored.

        log_open: [T, H], log(1 - alpha), hard (0 or minus infinity) unless `soft`; the T tokens are `rows` rows of
        equal length; documents: as in ops.gate.
        """
        read = dmc.BeforeRope.unpack(step.hidden, *step.key.shape[1:])
        alpha = -log_open.expm1()
        if soft:
            tensors = (x.unflatten(0, (rows, -1)) for x in (read.key, step.value, read.importance, alpha))
            means = dmc.soft_accumulate(*tensors, window=self.reach, documents=documents)
            key, value = (x.flatten(0, 1) for x in means)
        else:
            length = len(alpha) // rows
            merge = (alpha > 0).unflatten(0, (rows, length))
            if documents is not None:
                merge[:, 1:] &= (documents[:, 1:] == documents[:, :-1])[..., None]
            zero = torch.zeros_like(read.key[:rows])
            nothing = dmc.Carry(zero[..., 0], zero, torch.zeros_like(step.value[:rows]))
            starts = torch.arange(rows + 1, dtype=torch.int32, device=zero.device) * length
            key, value, _ = dmc.accumulate(
                read.key, step.value, read.importance, merge.flatten(0, 1), nothing, starts=starts, longest=length
            )
        return dmc.rotate(key, read.cos, read.sin).to(step.key.dtype), value
