"""reports.vllm: every work, how many times dense, and what was aimed at."""

from pathlib import Path

from pages import assert_published, rewritten
from sparsekv.bench.reports.vllm import BLOCK, lines, main
from sparsekv.markdown import markers

SHARED = {"shape": "qwen3-8b", "tp": 1, "pp": 1, "kv_gib": 40, "device": "a GPU", "vllm": "0.26", "commit": "abc"}
STEP = SHARED | {"what": "step", "batch": 8, "context": 32768}
SERVE = SHARED | {"what": "serve", "in": 1024, "out": 4096}
ROWS = [
    SHARED | {"mode": "dense", "what": "start", "seconds": 90.0},
    STEP | {"mode": "dense", "ms": 20.0, "ratio_of_probe": None},
    STEP | {"mode": "plugin", "ms": 9.0, "ratio_of_probe": 8.1},
    STEP | {"mode": "plugin", "ms": 6.0, "ratio_of_probe": 8.1, "tp": 2},
    SERVE | {"mode": "dense", "requests": 57, "out_tokens_per_second": 3000.0, "ratio_of_probe": None},
    SERVE | {"mode": "plugin", "requests": 384, "out_tokens_per_second": 9000.0, "ratio_of_probe": 8.0},
]


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    text = rewritten(main, ROWS, tmp_path, block=BLOCK)
    assert text.startswith("qwen3-8b with random weights, a GPU, vLLM 0.26, commit abc, seed 0,")
    assert "| 1 | step of 8 x 32,768 tokens, ms | 20 | - | 9 | 8.1 | 2.22 x | 2.00 x | met |" in text
    assert "| 2, tensor parallel | step of 8 x 32,768 tokens, ms | - | - | 6 | 8.1 | - | - |  |" in text


def test_the_published_table_is_that_of_the_results(tmp_path: Path) -> None:
    assert_published(main, "vllm-h200.jsonl", ["docs/vllm.md"], tmp_path, block=BLOCK)


def test_many_requests_are_compared_with_what_fills_the_memory_densely() -> None:
    (found,) = (line for line in lines(ROWS) if "384" in line[1])
    assert found[-3:] == ["3.00 x", "3.50 x", "missed"]


def test_what_was_not_aimed_at_has_no_aim() -> None:
    """57 requests side by side; short ones that all run at once, not 64 at a time."""
    fewer = SERVE | {"mode": "plugin", "requests": 57, "out_tokens_per_second": 4000.0, "ratio_of_probe": 8.0}
    found = {line[1]: line[-3:] for line in lines([*ROWS, fewer, *_churn(10.4, 12.5), *_churn(14.0, 14.5, at_once=64)])}
    assert found["57 x (1,024 in, 4,096 out), tokens/s"] == ["1.33 x", "-", ""]
    assert found["512 x (256 in, 64 to 448 out), all at once, s"] == ["0.83 x", "-", ""]
    assert found["512 x (256 in, 64 to 448 out), 64 at once, s"] == ["0.97 x", "0.95 x", "met"]


def _churn(dense: float, plugin: float, **options: int) -> list[dict]:
    shared = SHARED | {"what": "churn", "requests": 512, "ratio_of_probe": 8.0} | options
    return [shared | {"mode": "dense", "seconds": dense}, shared | {"mode": "plugin", "seconds": plugin}]


def test_no_lines_are_one_sentence(tmp_path: Path) -> None:
    results, page = tmp_path / "found.jsonl", tmp_path / "page.md"
    results.write_text("")
    page.write_text("\n".join(markers(BLOCK)))
    assert main([str(results), str(page)]) == 2
