"""report: what the page says is what the results file holds, and nothing outside the markers changes."""

import json
from pathlib import Path

import pytest

from pages import assert_published
from sparsekv.bench.reports.performance import BLOCK, CPU_BLOCK, main
from sparsekv.bench.reports.targets import against_targets, find
from sparsekv.markdown import markers

(BEGIN, END), (BEGIN_CPU, END_CPU) = markers(BLOCK), markers(CPU_BLOCK)
RESULTS = Path(__file__).parents[3] / "benchmarks/results/h100.jsonl"


@pytest.fixture
def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def test_the_published_tables_are_those_of_the_results(tmp_path):
    assert_published(main, "h100.jsonl", ["docs/performance.md"], tmp_path, block=BLOCK)


def test_only_the_block_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n")
    assert main([str(RESULTS), str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "STALE" not in text


@pytest.mark.parametrize("text", ["none", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_markers_is_left_alone(tmp_path, capsys, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert main([str(RESULTS), str(page)]) == 2
    assert "once each" in capsys.readouterr().err
    assert page.read_text() == text


def test_verdicts_follow_the_measurement(rows):
    name = "decode kernel, 1 x 4K live"
    row = find(rows, "decode", batch=1, context=32768)
    for us, verdict in ((25.0, "met"), (25.1, "missed")):
        row["us"] = us
        assert {line[0]: line[-1] for line in against_targets(rows)}[name] == verdict


def test_a_figure_that_was_not_measured_is_named(rows):
    rows.remove(find(rows, "decode", batch=1, context=32768))
    with pytest.raises(ValueError, match="0 rows of decode at batch 1, context 32768"):
        against_targets(rows)


def test_the_page_of_a_cpu_has_a_line_a_measurement_with_every_run(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "cpu.jsonl"
    page.write_text(f"before\n{BEGIN_CPU}\nSTALE\n{END_CPU}\nafter\n")
    shared = {"model": "tiny", "hardware": "a CPU", "threads": 2, "torch": "2", "transformers": "5", "commit": "abc"}
    shared |= {"marks": "random-marks", "ratio_asked": 4.0}
    runs = [
        {"bench": "decode", "context": 4000, "ratio_held": 4.1, "dense_ms": 8.0 * s, "sparsekv_ms": 8.0, "speedup": s}
        for s in (1.25, 0.5, 1.5)
    ]
    runs.append({"bench": "prefill", "tokens": 2048, "dense_ms": 9.0, "sparsekv_ms": 12.0, "speedup": 0.75})
    results.write_text("".join(json.dumps(shared | run) + "\n" for run in runs))
    assert main([str(results), str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN_CPU}\ntiny, a CPU, 2 threads,")
    assert text.endswith(f"\n{END_CPU}\nafter\n")
    assert "| a token after 4000 | random-marks | 4.10 | 10.0 | 8.0 | 1.25 | 1.25, 0.50, 1.50 |" in text
    assert "| read 2048 tokens | random-marks | 4.00 | 9.0 | 12.0 | 0.75 | 0.75 |" in text
