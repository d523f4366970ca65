"""The comparison from its file to its page, at small size: each cell once, every method beside dense."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsekv
from distributing import SERVER
from helpers import random_heads
from pages import assert_published
from sparsekv.evals.calibrate import Dial, calibrate
from sparsekv.evals.methods import measure
from sparsekv.evals.methods.continuation import Continuation
from sparsekv.json_lines import read_lines
from sparsekv.markdown import markers
from sparsekv.modeling.adapter import AdapterConfig, base_shape, save_adapter
from sparsekv.modeling.load import load_model
from sparsekv.policies import policy_names
from sparsekv.studies import workers
from sparsekv.studies.comparison.__main__ import STUDY, main
from sparsekv.studies.comparison.cells import _bench, grouped_cells
from sparsekv.studies.comparison.report import BLOCK
from sparsekv.studies.comparison.results import Results
from sparsekv.studies.comparison.study import load_study

BEGIN, END = markers(BLOCK)
ROOT = Path(__file__).parents[3]
METHODS = ["random", "tova", "quest", "dms", "dms-quest"]


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> str:
    """Random heads, and a made-up table of ratios."""
    model, _ = load_model(str(folder))
    sparsekv.attach(model, policy="dms", window=8)
    config = AdapterConfig(
        base_model_name_or_path=str(folder),
        base_shape=base_shape(model),
        window=8,
        offsets=[(-4.0, 1.5), (4.0, 4.0)],
    )
    save_adapter(random_heads(model), tmp_path / "adapter", config)
    return str(tmp_path / "adapter")


@pytest.fixture
def study(folder: Path, adapter: str, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    values = {
        "model": str(folder),
        "methods": {
            "random": None,
            "tova": None,
            "quest": None,
            "dms": {"adapter": adapter},
            "dms-quest": {"adapter": adapter, "reads": [0.5, 0.25]},
        },
        "ratios": [2],
        "text": str(folder / "texts"),
        "batch": 2,
        "perplexity": {"rows": 2, "length": 96, "scored": 12},
        "retrieval": {"kinds": ["pass key"], "contexts": [256], "items": 1},
        "speed": {"batches": [1, 2], "prompt": 24, "output": 6, "ratio": 2, "kv_memory": "8MiB"},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_each_cell_is_made_once_and_shown(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    run = ["run", str(out), "--study", str(study), "--commit", "abc"]
    assert main([*run, "--only", "tova at 2,speed of random"]) == 0
    assert main(run) == 0
    lines = read_lines(out / "comparison.jsonl")
    assert {line["cell"] for line in lines} == {
        "dense", *(f"{name} at 2" for name in METHODS), "dms-quest at 2 reading 0.25",
        *(f"speed of {name}" for name in ["dense", *METHODS]),
    }  # fmt: skip
    assert all(line["hardware"] and line["seed"] == 0 and line["commit"] == "abc" for line in lines)
    quality = [line for line in lines if line["kind"] == "quality"]
    assert [(x["policy"], x["task"]) for x in quality if x["cell"] == "random at 2"] == [
        ("random", "perplexity"),
        ("random", "pass key"),
    ]
    before = (out / "comparison.jsonl").read_bytes()
    assert main(run) == 0
    assert (out / "comparison.jsonl").read_bytes() == before

    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(out / "comparison.jsonl"), str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert all(
        title in text for title in ("## Ratio 2", "## How little DMS + Quest may read", "## Speed in the engine")
    )
    assert text.count("| random |") == text.count("| dense |") == 4
    assert (tmp_path / "img" / "comparison.png").stat().st_size > 5000


def test_dense_is_measured_once_in_a_run_and_speed_after_the_first_ratio(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(study.read_text()) | {"ratios": [3, 2], "methods": {"random": None, "tova": None}}
    study.write_text(yaml.safe_dump(values))
    first, speed, rest = grouped_cells(study, shared=tmp_path)
    assert list(first) == ["dense", "random at 3", "tova at 3"]
    assert list(speed) == ["speed of dense", "speed of random", "speed of tova"]
    assert list(rest) == ["random at 2", "tova at 2"]

    one = [first[name]() for name in first]
    _bench.cache_clear()  # as another process begins
    monkeypatch.setattr(Continuation, "dense", None)
    other = [first[name]() for name in first]
    for ours, theirs in zip(one, other, strict=True):
        assert [line["scores"] for line in ours] == [line["scores"] for line in theirs]


def test_trained_heads_are_dialled_once_for_a_text(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dials = []

    def counted(*args: Any, **options: Any) -> list[Dial]:
        dials.append(options["targets"])
        return calibrate(*args, **options)

    monkeypatch.setattr(measure, "calibrate", counted)
    _bench.cache_clear()
    first, *_ = grouped_cells(study, shared=tmp_path)
    lines = {name: first[name]()[0] for name in ("dms at 2", "dms-quest at 2 reading 0.25")}
    assert dials == [[2], [2]]  # text and questions
    held = {line["tokens_held"] for line in lines.values()}
    assert len(held) == 1


def test_methods_hold_as_much_at_their_peak(study: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(study.read_text()) | {"methods": {"tova": None, "snapkv": None}, "retrieval": {}}
    values |= {"perplexity": {"rows": 1, "length": 200, "scored": 12}, "speed": None}
    study.write_text(yaml.safe_dump(values))
    assert main(["run", str(tmp_path), "--study", str(study)]) == 0
    lines = {line["method"]: line for line in read_lines(tmp_path / "comparison.jsonl")}
    assert lines["tova"]["tokens_held"] == lines["snapkv"]["tokens_held"] == 100
    assert (lines["tova"]["budget"], lines["snapkv"]["budget"]) == (100, 88)


@pytest.mark.slow
def test_processes_make_what_one_makes(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, since test_runner.py begins them anew."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: SERVER)
    study.write_text(yaml.safe_dump(yaml.safe_load(study.read_text()) | {"retrieval": {}, "speed": None}))
    found = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        only = "dense,dms-quest at 2"
        assert main(["run", str(out), "--study", str(study), "--processes", processes, "--only", only]) == 0
        lines = read_lines(out / "comparison.jsonl")
        found.append({(x["method"], x["task"]): (x["scores"], x["kv_reads"], x["tokens_held"]) for x in lines})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": {"lru": None}}, "unknown policy 'lru'"),
        ({"ratios": []}, "the study's grid is empty"),
        ({"methods": {"dense": None}}, "dense is measured anyway"),
        ({"methods": {"dms": None}}, "policy 'dms' needs trained eviction heads"),
        ({"methods": {"tova": {"reads": [0.5]}}}, "reads is 0.5; it is a share"),
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
    assert "unknown cells x; the study has dense, dms at 2" in capsys.readouterr().err


def test_the_committed_study_compares_every_method_that_has_a_budget_or_an_adapter() -> None:
    study = load_study(ROOT / STUDY)
    assert set(policy_names()) - {method.policy for method in study.methods} == {"dense", "dmc"}  # none is shipped


def test_a_page_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.jsonl").write_text("")
    assert main(["report", str(tmp_path / "r.jsonl"), str(tmp_path / "page.md")]) == 2
    assert f"there is no page {tmp_path / 'page.md'}; give one with the lines {BEGIN}" in capsys.readouterr().err


def test_a_method_s_own_share_is_that_of_which_most_was_measured() -> None:
    """Whatever ends first."""
    share = {"method": "dms-quest", "cr": 4.0, "task": "perplexity"}
    lines = [share | {"reads": 0.75}, share | {"reads": 0.375}, share | {"reads": 0.375, "task": "look-up"}]
    for order in (lines, lines[::-1]):
        found = Results(lines=order).of("dms-quest", 4.0)
        assert [line["reads"] for line in found] == [0.375, 0.375]
    assert Results(lines=[]).of("dms-quest", 4.0) == []


def test_the_published_tables_are_those_of_the_results(tmp_path: Path) -> None:
    def report(arguments: list[str]) -> int:
        return main(["report", *arguments])

    assert_published(report, "comparison.jsonl", ["docs/comparison.md"], tmp_path, block=BLOCK)
