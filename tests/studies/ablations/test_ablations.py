"""A study from its file to its page: each run once, measured alike, and nothing made twice."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sparsekv
import tiny
from helpers import tiny_model
from sparsekv.markdown import markers
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.studies.ablations.__main__ import STUDY, main
from sparsekv.studies.ablations.controls import CONTROLS
from sparsekv.studies.ablations.report import BLOCK
from sparsekv.studies.ablations.study import load_study, merged

BEGIN, END = markers(BLOCK)
ROOT = Path(__file__).parents[3]
RUNS = {
    "base": {"family": [2]},
    "on the way": {"checkpoint": 2},
    "window 16": {"window": 16},
    "shuffled": {"control": "shuffled"},
}
EVALUATION = {"ratios": [2, 3], "rows": 2, "length": 128, "items": 1, "contexts": [256], "batch": 2}


@pytest.fixture
def study(configure: Callable[..., RetrofitConfig], folder: Path, tmp_path: Path) -> Path:
    base = asdict(configure(max_steps=2, lr=0.05)) | {"evaluation": EVALUATION}
    base["evaluation"]["other_texts"] = [str(folder / "texts" / "0.txt")]
    pictures = {"window": {"title": "The window", "runs": ["window 16", "base"]}}
    other_data = {"data": [{"kind": "text", "names": [str(folder / "texts" / f"{i}.txt") for i in range(4)]}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": base, "runs": RUNS | {"other data": other_data}, "pictures": pictures}))
    return path


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ablations.jsonl").read_text().splitlines()]


def test_each_run_is_made_once_measured_at_each_ratio_and_shown(study: Path, tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "runs", tmp_path / "page.md"
    run = ["run", str(out), "--study", str(study)]
    assert main([*run, "--only", "shuffled"]) == 0
    assert {line["run"] for line in results(out)} == {"shuffled"}
    assert main(run) == 0
    lines = results(out)
    assert [(line["run"], line["asked"]) for line in lines] == [
        *(("shuffled", asked) for asked in (2, 3, None)),
        *(("base", asked) for asked in (2, 3, None)),
        ("on the way", None),
        *(("other data", asked) for asked in (2, 3, None)),
        *(("window 16", asked) for asked in (2, 3, None)),
    ]
    assert len({line["perplexity_dense"] for line in lines}) == 1  # all are measured on the same text
    for line in lines:
        assert line["steps"] == 2
        assert line["seed"] == line["config"]["seed"]
        if line["asked"] is not None:
            measured = [line["ratio"], *(text["ratio"] for text in line["others"].values())]
            assert measured == pytest.approx([line["asked"]] * 2, rel=0.1)
    assert lines[6]["others"]  # the checkpoint's one line, as it was saved
    assert lines[-1]["changes"] == {"window": 16}
    assert lines[-1]["config"]["window"] == 16
    before = (out / "ablations.jsonl").read_bytes()
    capsys.readouterr()
    assert main(run) == 0
    assert (out / "ablations.jsonl").read_bytes() == before
    assert capsys.readouterr().err == ""

    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(out / "ablations.jsonl"), str(page), "--study", str(study)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert text.count("| window 16 |") == 3
    assert "![The window](img/ablations-window.png)" in text
    assert (tmp_path / "img" / "ablations-window.png").stat().st_size > 5000
    assert "Not in these results" not in text

    some = tmp_path / "some.jsonl"
    some.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line["run"] != "window 16"))
    assert main(["report", str(some), str(page), "--study", str(study)]) == 0
    text = page.read_text()
    assert "Not in these results: window 16." in text
    assert "The window" not in text


def test_time_is_bounded(study: Path, tmp_path: Path, capsys) -> None:
    run = ["run", str(tmp_path / "runs"), "--study", str(study), "--set", "calibration.rows=1"]
    assert main([*run, "--seconds", "-1"]) == 0
    assert "base and what follows are left out" in capsys.readouterr().err
    assert main([*run, "--only", "base"]) == 0
    assert main([*run, "--run-seconds", "1e-9"]) == 0
    assert "window 16 is left out" in capsys.readouterr().err
    assert {line["run"] for line in results(tmp_path / "runs")} == {"base", "on the way", "shuffled"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": {"base": {}, "x": {"window": 0}}}, "run x: window is 0"),
        ({"runs": {"base": {}, "x": {"control": "none"}}}, "run x: a control is one of shuffled, random"),
        ({"runs": {"base": {}, "x": {"checkpoint": 4}}}, "run x: a checkpoint is a ratio of the base's family"),
        ({"runs": {"x": {}}}, "a run named base"),
        ({"pictures": {"p": {"title": "t", "runs": ["y"]}}}, "unknown runs: y"),
        ({"base": {"model": "m"}}, "run base: the configuration lacks"),
    ],
)
def test_a_study_that_does_not_fit_is_one_sentence(study: Path, changes: dict, sentence: str, capsys) -> None:
    study.write_text(yaml.safe_dump(yaml.safe_load(study.read_text()) | changes))
    assert main(["run", "out", "--study", str(study)]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_sections_are_merged_key_by_key() -> None:
    assert merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}}) == {"a": {"x": 1, "y": 4}, "b": 3}


def test_the_committed_study_loads_and_every_run_is_shown() -> None:
    study = load_study(ROOT / STUDY)
    assert {name for picture in study.pictures for name in picture.runs} == set(study.runs)
    assert study.runs["only to 2"].config.steps == study.runs["base"].config.steps == 175
    assert study.runs["immediate eviction"].config.evaluation.eviction == "mask"


def test_the_committed_study_of_broader_data_loads_and_every_run_is_shown() -> None:
    study = load_study(ROOT / "configs/ablations-broad.yaml")
    assert {name for picture in study.pictures for name in picture.runs} == set(study.runs)
    for name, run in study.runs.items():
        others = {"both to 16": 180, "long at 12": 1900, "long at random ratios": 1900}
        steps, tokens = others.get(name, 175), 8 * 2048
        assert run.config.steps * run.config.batch * run.config.length == steps * tokens
        assert "," not in name  # --only takes names with commas between


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_keep_sizes_and_nothing_of_what_was_learnt(name: str) -> None:
    model = tiny_model(num_hidden_layers=4)
    sparsekv.attach(model, policy="dms", window=4)
    tiny.random_heads(sparsekv.heads(model))
    before = torch.cat([head.weight.clone() for head in sparsekv.heads(model)])
    CONTROLS[name](sparsekv.heads(model), seed=1)
    after = torch.cat([head.weight for head in sparsekv.heads(model)])
    assert not torch.equal(before, after)
    if name == "shuffled":
        assert torch.equal(before.sort(0).values, after.sort(0).values)
    assert torch.allclose(before.norm(dim=1).sort().values, after.norm(dim=1).sort().values)
