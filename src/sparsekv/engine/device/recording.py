"""A forward as a CUDA graph."""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before recording: compilation, and kernels' own first-time work."""


def record(forward: Callable[[], Tensor], *, pool: Any, what: str) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph and what it gives, which each replay writes anew. pool: of torch.cuda.graph_pool_handle; what: it is,
    for the log. The warm-ups run for real."""
    begun = time.perf_counter()
    stream = _warm_up_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = forward()
    log.info("recorded %s in %.1f s", what, time.perf_counter() - begun)
    return graph, out


@cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings of a device: cuBLAS keeps a workspace of tens of MiB for every stream it ever saw."""
    return torch.cuda.Stream(device)
