"""The comparison from its file to its page, at small size: each cell once, every method beside dense."""

import json
from pathlib import Path

import pytest
import yaml

from sparsekv.markdown import markers
from sparsekv.policies import policy_names
from sparsekv.studies.comparison.__main__ import STUDY, main
from sparsekv.studies.comparison.report import BLOCK
from sparsekv.studies.comparison.study import load_study

BEGIN, END = markers(BLOCK)
ROOT = Path(__file__).parents[3]
POLICIES = ["random", "tova", "quest"]


@pytest.fixture
def study(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    values = {
        "model": str(folder),
        "policies": POLICIES,
        "ratios": [2],
        "text": str(folder / "texts"),
        "batch": 2,
        "perplexity": {"rows": 1, "length": 96},
        "retrieval": {"kinds": ["pass key"], "contexts": [256], "items": 1},
        "speed": {"batches": [1, 2], "prompt": 24, "output": 6, "ratio": 2},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_each_cell_is_made_once_and_shown(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    run = ["run", str(out), "--study", str(study)]
    assert main([*run, "--only", "tova at 2,speed of random"]) == 0
    assert main(run) == 0
    lines = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    assert {line["cell"] for line in lines} == {
        "dense", *(f"{name} at 2" for name in POLICIES), *(f"speed of {name}" for name in ["dense", *POLICIES])
    }  # fmt: skip
    quality = [line for line in lines if line["kind"] == "quality"]
    assert [(x["policy"], x["task"]) for x in quality if x["cell"] == "random at 2"] == [
        ("random", "perplexity"),
        ("random", "pass key"),
    ]
    budgeted = [line for line in quality if line["policy"] in ("random", "tova") and line["task"] == "perplexity"]
    assert all(line["tokens_held"] == line["budget"] == 48 for line in budgeted)
    assert all(line["hardware"] and line["seed"] == 0 for line in lines)
    before = (out / "comparison.jsonl").read_bytes()
    assert main(run) == 0
    assert (out / "comparison.jsonl").read_bytes() == before

    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(out / "comparison.jsonl"), str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert "## Ratio 2" in text
    assert text.count("| random |") == text.count("| dense |") == 2
    assert (tmp_path / "img" / "comparison.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policies": ["lru"]}, "unknown policy 'lru'"),
        ({"ratios": []}, "the study's grid is empty"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
        ({"perplexity": {"rows": 0}}, "rows is 0"),
    ],
)
def test_a_study_that_does_not_fit_is_one_sentence(
    study: Path, changes: dict, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study.write_text(yaml.safe_dump(yaml.safe_load(study.read_text()) | changes))
    assert main(["run", "out", "--study", str(study)]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_unknown_cells_are_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "out", "--study", str(study), "--only", "x"]) == 2
    assert "unknown cells x; the study has dense, random at 2" in capsys.readouterr().err


def test_the_committed_study_compares_every_method_that_has_a_budget_or_an_adapter() -> None:
    study = load_study(ROOT / STUDY)
    assert set(policy_names()) - set(study.policies) == {"dense", "dmc"}  # no DMC checkpoint is shipped
