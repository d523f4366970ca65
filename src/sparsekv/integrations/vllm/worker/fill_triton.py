"""fill in Triton: one launch, a lane a request."""

# triton.jit's types know no launch options.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparsekv.integrations.vllm.worker.fill import BEYOND

if TYPE_CHECKING:
    from sparsekv.integrations.vllm.worker.fill import Step, Target

LANES = 128
BEHIND = tl.constexpr(BEYOND)


def fill(step: Step, target: Target) -> None:
    """See fill.fill."""
    count, places = len(step.starts) - 1, target.split.shape[1]
    lanes = max(count, places + 1)
    _fill[(triton.cdiv(lanes, LANES),)](
        step.blocks, step.slots, step.starts, step.after, target.rows, target.seen, target.split, target.starts,
        count, step.decodes, len(step.slots) - 1, step.blocks.stride(0), places, LANES=LANES, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "starts", "after", "count", "decodes", "last", "width", "places"])
def _fill(
    blocks, slots, starts, after, rows, seen, split, split_starts, count, decodes, last, width, places,
    LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < count
    start = tl.load(starts + lane, mask=lane <= count, other=BEHIND)
    end = tl.load(starts + lane + 1, mask=real, other=0)
    slot = tl.load(slots + tl.minimum(start, last), mask=real, other=-1)
    block = tl.load(blocks + lane * width, mask=real, other=0)
    row = tl.where(slot < 0, -1, block.to(tl.int64) - 1)
    tl.store(rows + lane, row, mask=real)
    tl.store(seen + lane, tl.load(after + lane, mask=real, other=0) - (end - start), mask=real)
    inside = (lane < places) & (count < places)
    tl.store(split + lane, tl.where(lane < decodes, row, -1), mask=inside)
    tl.store(split + places + lane, tl.where(lane < decodes, -1, row), mask=inside)
    tl.store(split_starts + lane, start, mask=(lane < places + 1) & (count < places))
