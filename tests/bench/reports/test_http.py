"""reports.http: every load of every ratio, and what was aimed at."""

import json
from pathlib import Path

from pages import assert_published, rewritten
from sparsekv.bench.reports.http import BLOCK, main, verdicts

SHARED = {"shape": None, "ratio": 4.0, "rows": 64, "memory": 2**28, "prompt": [32, 256], "output": [16, 64], "seed": 0}
SHARED |= {"hardware": "a CPU", "torch": "2", "commit": "abc"}
TIMES = {"first_ms_p50": 10.2, "first_ms_p99": 20.4, "gap_ms_p50": 3.0, "gap_ms_p99": 5.0, "requests_sent": 48}
ROWS = [
    SHARED | {"load": "direct", "tokens_per_s": 1040.0},
    SHARED | TIMES | {"load": "peak", "tokens_per_s": 1000.0, "http_cost": 0.04, "refused": 0},
    SHARED | TIMES | {"load": "twice", "tokens_per_s": 800.0, "of_peak": 0.8, "refused": 7},
]


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    text = rewritten(main, ROWS, tmp_path, block=BLOCK)
    assert text.startswith("smollm2-135m, a CPU, torch 2, commit abc, seed 0:")
    assert "| 4 | all at once, the engine alone | 1,040 | - | - | - |" in text
    assert "| 4 | twice the peak | 800 | 10 (20) | 3 (5) | 7 of 48 |" in text


def test_the_published_table_is_that_of_the_results(tmp_path: Path) -> None:
    assert_published(main, "serve-http.jsonl", ["docs/serve.md"], tmp_path, block=BLOCK)


def test_aims() -> None:
    assert [line[-1] for line in verdicts(ROWS)] == ["met", "missed"]
    assert [line[-1] for line in verdicts([ROWS[1] | {"http_cost": 0.06}, ROWS[2] | {"of_peak": 0.9}])] == [
        "missed",
        "met",
    ]


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    results, page = tmp_path / "found.jsonl", tmp_path / "page.md"
    results.write_text(json.dumps(ROWS[0]) + "\n")
    page.write_text("none")
    assert main([str(results), str(page)]) == 2
    assert page.read_text() == "none"
