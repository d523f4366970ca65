"""Whose tokens a step has, written into StepBuffers' tensors: in plain PyTorch, and in Triton by one launch.

A request's row is its one block, less one; -1 for padding, and for dummy batches, whose tokens have no slot and whose
block tables are stale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.ops.layout import check_backend

BACKENDS = ("reference", "triton")
BEYOND = 2**31 - 1
"""Where requests that do not exist start: behind every token."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What vLLM says of a step, on the device: B requests, decodes first, perhaps padded."""

    blocks: Tensor
    """int32 [B, any]: the block tables."""
    slots: Tensor
    """int64 [T]: of tokens; negative where there is none."""
    starts: Tensor
    """int32 [B + 1], among the step's tokens."""
    after: Tensor
    """int32 [B]: tokens of each request once the step is over."""
    decodes: int
    """How many have one token."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is filled, for `requests` at once, or more where a graph of decodes is padded."""

    rows: Tensor
    """int64 [places]: of each request."""
    seen: Tensor
    """int32 [places + 1]: tokens before the step."""
    split: Tensor
    """int64 [2, requests + 1]: rows of decodes, rows of chunks, each at its request's place; else -1. Left alone where
    a graph of decodes is padded to more than `requests`."""
    starts: Tensor
    """int32 [requests + 2], BEYOND behind the last. Left alone as `split`."""


def fill(step: Step, target: Target, *, backend: str | None = None) -> None:
    """Waits for nothing. Without a backend's name, Triton runs on CUDA, the reference elsewhere.

    Raises ValueError where the backend asked for is unknown or cannot run.
    """
    if check_backend(backend, step.starts.device, BACKENDS) == "triton":
        from sparsekv.integrations.vllm.worker import fill_triton

        fill_triton.fill(step, target)
    else:
        _reference(step, target)


def _reference(step: Step, target: Target) -> None:
    count = len(step.starts) - 1
    first = step.slots[step.starts[:-1].long().clamp(max=len(step.slots) - 1)]
    rows = torch.where(first < 0, -1, step.blocks[:count, 0].long() - 1)
    target.rows[:count] = rows
    target.seen[:count] = step.after - (step.starts[1:] - step.starts[:-1])
    if count < target.split.shape[1]:
        target.split.fill_(-1)
        target.split[0, : step.decodes] = rows[: step.decodes]
        target.split[1, step.decodes : count] = rows[step.decodes :]
        target.starts[: count + 1] = step.starts
        target.starts[count + 1 :] = BEYOND
