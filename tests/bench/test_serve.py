"""Whole workloads through LLM: every request gets its tokens, and the figures say what was done."""

from dataclasses import replace

import pytest
import torch

from sparsekv.bench.serve import WORKS, Work, bench_serve, works_of

TINY = Work(name="tiny", ratio=2, requests=3, prompt=150, output=(3, 6), rows=2, shape="tiny", memory=2**24)


def test_a_line_for_each_start_and_each_work() -> None:
    works = [
        TINY,
        replace(TINY, name="chains", samples=2, requests=2, sampling="top-p"),
        replace(TINY, name="dense", ratio=1, arrivals=200.0),
    ]
    lines = list(bench_serve(works, device=torch.device("cpu"), dtype=torch.float32))
    assert [line["work"] for line in lines] == ["start", "tiny", "chains", "start", "dense"]
    _, tiny, chains, _, dense = lines
    assert 9 <= tiny["tokens_per_s"] * tiny["seconds"] <= 18
    assert tiny["ratio_held"] > 1.1
    assert dense["ratio_held"] == 1
    assert chains["samples"] == 2
    assert 0 < dense["gap_ms_median"] <= dense["gap_ms_p99"]
    assert "gap_ms_median" not in tiny
    assert all(line["bench"] == "serve" and line["hardware"] for line in lines)


def test_rows_by_name() -> None:
    assert [work.name for work in works_of(["long-8", "churn-1"])] == ["long-8", "churn-1"]
    assert len({work.name for work in WORKS}) == len(WORKS)
    with pytest.raises(ValueError, match="unknown row 'no'; use some of short-greedy"):
        works_of(["no"])
