"""reports.adapters: the pages say what the shipped adapters' own evaluations say, beside what was aimed at."""

import json
from pathlib import Path

import pytest

from pages import ROOT
from sparsekv.bench.reports.adapters import AIMS, NAMES, aims, costs, main
from sparsekv.json_lines import read_lines
from sparsekv.markdown import replaced

RESULTS = ROOT / "benchmarks/results/long.jsonl"
PAGES = {"README.md": "adapters", "docs/retrofit.md": "adapters-aims"}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results name their adapters from there."""
    monkeypatch.chdir(ROOT)


def test_the_published_tables_are_those_of_the_results(tmp_path: Path) -> None:
    copies = {page: tmp_path / Path(page).name for page in PAGES}
    for page, block in PAGES.items():
        copies[page].write_text(replaced(ROOT / page, "STALE", name=block))
    assert main([str(RESULTS), *map(str, copies.values())]) == 0
    for page, copy in copies.items():
        assert copy.read_text() == (ROOT / page).read_text()


def test_each_ratio_has_its_row_and_only_what_was_never_trained_on_its_columns() -> None:
    lines = read_lines(RESULTS)
    head, _, *rows = costs(lines).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [str(ratio) for ratio in AIMS]
    assert head.count("bible / lexicon") == len(NAMES) and "code" not in head


def test_an_aim_is_met_or_missed_by_what_is_shown(tmp_path: Path) -> None:
    lines = read_lines(RESULTS)
    for line, (name, share) in zip(lines, (("ones", 1.0), ("noughts", 0.0)), strict=True):
        results = json.loads((Path(line["adapter"]) / "eval.json").read_text())
        for score in results["scores"]:
            for cell in score["retrieval"].values():
                cell["kept"] = share
        line["adapter"] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps(results))
    facts = [row for row in aims(lines).splitlines() if "facts kept" in row]
    assert [("100% | " in row and row.endswith("met |")) for row in facts] == [True] * 4 + [False] * 4


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = read_lines(RESULTS)
    lines[0]["adapter"] = str(tmp_path)
    moved, one = tmp_path / "moved.jsonl", tmp_path / "one.jsonl"
    moved.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one.write_text(json.dumps(lines[0]) + "\n")
    for results, sentence in ((moved, "eval.json; run this where the adapter"), (one, "the results hold 1 lines")):
        assert main([str(results), *map(str, PAGES)]) == 2
        assert sentence in capsys.readouterr().err
