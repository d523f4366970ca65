"""predicted: the table of docs/plan.md is that of the results, and nothing outside the markers changes."""

from pathlib import Path

import pytest

from pages import assert_published
from sparsekv.bench.reports.predicted import BLOCK, main
from sparsekv.markdown import markers

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/results/h100.jsonl"
BEGIN, END = markers(BLOCK)


def test_the_published_table_is_that_of_the_results(tmp_path):
    assert_published(main, "h100.jsonl", ["docs/plan.md"], tmp_path, block=BLOCK)


@pytest.mark.parametrize(("lines", "text"), [(RESULTS, "no markers"), (None, f"{BEGIN}\n{END}\n")])
def test_a_page_or_results_that_do_not_serve_leave_the_page_alone(tmp_path, capsys, lines, text):
    page, empty = tmp_path / "page.md", tmp_path / "empty.jsonl"
    empty.write_text("")
    page.write_text(text)
    assert main([str(lines or empty), str(page)]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert page.read_text() == text
