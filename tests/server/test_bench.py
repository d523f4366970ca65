"""The load generator and the bench's arithmetic, on the tiny shape."""

import pytest
import torch

from sparsekv.server.load.bench import Setup, bench_http, numbered, summary
from sparsekv.server.load.clients import Met


def met(status: int = 200, *, sent: float = 0.0, moments: tuple[float, ...] = (1.0, 2.0)) -> Met:
    return Met(status=status, sent=sent, moments=list(moments), tokens=2 * len(moments))


def test_the_summary_counts_what_was_served() -> None:
    found = summary([met(), met(sent=1.0, moments=(1.5, 1.75, 4.0)), met(429, moments=())])
    assert (found["requests_sent"], found["refused"], found["seconds"]) == (3, 1, 4.0)
    assert found["requests_per_s"] == 0.5
    assert found["tokens_per_s"] == 10 / 4
    assert (found["first_ms_p50"], found["first_ms_p99"]) == (500, 500)
    assert found["gap_ms_p50"] == 1000
    with pytest.raises(RuntimeError, match="500"):
        summary([met(), met(500)])


def test_each_token_is_seen() -> None:
    tokenizer = numbered(50)
    assert tokenizer.decode([3, 49]) == "w3 w49"


@pytest.mark.slow
def test_a_run() -> None:
    setup = Setup(shape="tiny", ratio=4, rows=4, memory=2**20, requests=8, prompt=(4, 30), output=(2, 12))
    rows = list(bench_http(setup, device=torch.device("cpu"), dtype=torch.float32))
    assert [row["load"] for row in rows] == ["direct", "peak", "steady", "twice"]
    for row in rows[1:]:
        assert row["requests_sent"] == 8
        assert row["tokens_per_s"] > 0
        assert row["first_ms_p50"] > 0
    assert rows[1]["refused"] == 0
    assert rows[3]["arrivals"] == pytest.approx(2 * rows[1]["requests_per_s"])
