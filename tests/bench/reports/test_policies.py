"""The published table of methods is the one that the committed results give."""

from pathlib import Path

import pytest

from sparsekv.bench.reports.policies import main

ROOT = Path(__file__).parents[3]
RESULTS, PAGE = ROOT / "benchmarks/results/policies.jsonl", ROOT / "docs/policies.md"


def test_the_page_is_what_the_results_give(tmp_path: Path) -> None:
    page = tmp_path / "policies.md"
    page.write_text(PAGE.read_text())
    assert main([str(RESULTS), str(page)]) == 0
    assert page.read_text() == PAGE.read_text()
    assert "| random |" in page.read_text()


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    assert main([str(RESULTS), str(page)]) == 2
    assert "needs the lines" in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl"), str(PAGE)]) == 2
    assert "cannot read" in capsys.readouterr().err
