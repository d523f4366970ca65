"""reports.serve: each work beside vLLM's of the same requests and machine, losses as plain as wins."""

import json

from pages import assert_published
from sparsekv.bench.reports.serve import BLOCK, main, verdicts
from sparsekv.markdown import markers

BEGIN, END = markers(BLOCK)
SHARED = {"bench": "serve", "shape": "qwen3-8b", "rows": 64, "memory": 40 * 2**30, "seed": 0, "commit": "abc"}
SHARED |= {"hardware": "a GPU", "torch": "2"}
OURS, THEIRS = SHARED | {"engine": "sparsekv"}, SHARED | {"engine": "vLLM 0", "ratio": 1}
SHORT = {"requests": 64, "samples": 1, "prompt": 256, "output": 256, "sampling": "greedy"}
CHURN = SHORT | {"requests": 512, "output": [64, 447]}
LONG = SHORT | {"requests": 57, "prompt": 1024, "output": 4096}
ROWS = [
    OURS | {"work": "start", "ratio": 8, "start_s": 31.2, "first_requests_s": 10.0},
    OURS | {"work": "start", "ratio": 1, "start_s": 40.0},
    OURS | SHORT | {"work": "short-greedy", "ratio": 8, "seconds": 2.0, "tokens_per_s": 8192.0, "ratio_held": 3.9},
    OURS | CHURN | {"work": "churn-8", "ratio": 8, "seconds": 33.0, "tokens_per_s": 3972.0, "ratio_held": 4.5},
    OURS
    | CHURN
    | {"work": "arrivals-8", "ratio": 8, "seconds": 21.0, "tokens_per_s": 1000.0, "ratio_held": 4.5, "arrivals": 10.0}
    | {"gap_ms_median": 8.0, "gap_ms_p99": 15.0, "first_ms_median": 20.0, "first_ms_p99": 30.0},
    OURS
    | LONG
    | {"work": "long-8", "ratio": 8, "requests": 384, "rows": 384, "seconds": 110.0, "tokens_per_s": 13500.0}
    | {"ratio_held": 6.0},
    THEIRS | {"work": "start", "start_s": 100.0},
    THEIRS | SHORT | {"work": "short-greedy", "seconds": 2.5, "tokens_per_s": 6553.6},
    THEIRS | CHURN | {"work": "churn-8", "seconds": 30.0, "tokens_per_s": 4369.0},
    THEIRS | LONG | {"work": "long-1", "seconds": 66.0, "tokens_per_s": 3500.0},
]


def test_both_pages_say_what_was_measured(tmp_path):
    results, page, readme = (tmp_path / name for name in ("found.jsonl", "page.md", "readme.md"))
    results.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for path in (page, readme):
        path.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n")
    assert main([str(results), str(page), str(readme)]) == 0
    for text in (page.read_text(), readme.read_text()):
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"\n{END}\nafter\n")
        assert (
            "| qwen3-8b | start of an engine and its first requests, 64 sequences | 8 | - | 41.2 | 100.0 | 2.43 | - |"
            in text
        )
        assert "| 64 x (256, 256), greedy, 64 at once | 8 | 3.9 | 2.0 | 2.5 | 1.25 | 8,192 |" in text
        assert "| 512 x (256, 64 to 447), greedy, 64 at once | 8 | 4.5 | 33.0 | 30.0 | 0.91 | 3,972 |" in text
        assert "| 512 x (256, 64 to 447), greedy, 10 a second | 8 | 4.5 | 21.0 | - | - | 1,000 |" in text
        assert "ratio 8 gives 3.9 times the tokens per second of dense vLLM 0 (384 requests at once, and 57)" in text
    assert "p99 30" in page.read_text()
    assert "Of 5 aims 3 met, 2 missed" in readme.read_text()


def test_the_published_tables_are_those_of_the_results(tmp_path):
    assert_published(main, "serve-h200.jsonl", ["docs/performance.md", "README.md"], tmp_path, block=BLOCK)


def test_an_aim_is_judged_where_both_sides_were_measured():
    judged = {line[0]: line[-1] for line in verdicts(ROWS)}
    assert judged == {
        "start: seconds over vLLM's": "met",
        "short-greedy: seconds over vLLM's": "met",
        "churn-8: seconds over vLLM's": "missed",
        "long-8: tokens per second over dense vLLM's in the same memory": "missed",
        "time between tokens while prompts arrive, p99 over median": "met",
    }


def test_lines_of_two_machines_are_refused(tmp_path, capsys):
    results, page = tmp_path / "found.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[-1] | {"hardware": "another"}]))
    page.write_text(f"{BEGIN}\n{END}\n")
    assert main([str(results), str(page), str(page)]) == 2
    assert "2 machines (a GPU, another)" in capsys.readouterr().err
