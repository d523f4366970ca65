"""How benchmarks measure: medians of CUDA-event times of graph replays (wall times on the CPU), and the roofline."""

import time
from collections.abc import Callable
from typing import Any

import torch


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def median_ms(run: Callable[[], Any], device: torch.device, *, warmup: int = 3, repeats: int = 20) -> float:
    """Median milliseconds of `run` as it stands: device time on CUDA, wall time on the CPU."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def graph_ms(runs: list[Callable[[], Any]], device: torch.device, *, repeats: int = 20) -> float:
    """Median milliseconds of one of `runs`, all captured in one CUDA graph: no launch gaps and, with inputs
    that together exceed the L2 cache, no hits left over from the run before. On the CPU the runs follow one another.
    """

    def all_runs() -> None:
        for run in runs:
            run()

    if device.type != "cuda":
        return median_ms(all_runs, device, warmup=1, repeats=3) / len(runs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_runs()
        all_runs()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_runs()
    return median_ms(graph.replay, device, repeats=repeats) / len(runs)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read plus write: the roofline of everything that only moves memory."""
    size = 2**32 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    return 2e3 * size / median_ms(lambda: target.copy_(source), device, repeats=7)
