"""`sparsekv scale`: the smoke study as it is shipped, and what is refused."""

import json
import time
from pathlib import Path

import pytest
import yaml

from commands import refused, save_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_smoke_study_writes_its_report_in_under_a_minute(run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    began = time.process_time()
    outcome = run("scale", "studies/smoke.yaml", "--out", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    assert time.process_time() - began < 60
    results = json.loads(outcome.out)["results"]
    assert {row["method"] for row in results} == {"dense", "dms", "tova"}
    assert (tmp_path / "report.html").stat().st_size > 20_000
    again = run("scale", "studies/smoke.yaml", "--out", tmp_path, "--json")
    assert json.loads(again.out)["results"] == results
    assert run("scale", "studies/smoke.yaml", "--out", tmp_path, "--cells").out.strip() == ""


@pytest.fixture
def study(tmp_path):
    folder = save_model(tmp_path / "model")
    values = {"model": str(folder), "policies": ["dense"], "tasks": ["sums-2"], "lengths": [4, 8], "problems": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values | {"widths": [1, 2], "kv_memory": "8MiB"}))
    return path


def test_steps_of_one_study(run, study, tmp_path):
    out = tmp_path / "out"
    assert run("scale", study, "--out", out, "--cells").out.split() == ["dense/sums-2/0"]
    refused(run("scale", study, "--out", out, "--report"), "holds no draws of this study; run it first")
    refused(run("scale", study, "--out", out, "--markdown", tmp_path / "x.md"), "there is no page")
    assert run("scale", study, "--out", out).code == 0
    assert run("scale", study, "--out", out, "--report").code == 0
    refused(run("scale", study, "--out", out, "--only", "tova"), "no cell is called 'tova'")
    refused(run("scale", study, "--out", out, "--ray", "auto"), "--ray needs Ray")


def test_heads_that_are_not_there_are_told_before_anything_is_drawn(run, study, tmp_path):
    values = yaml.safe_load(study.read_text()) | {"policies": ["dense", "dms"], "ratios": [2], "adapter": "nowhere/x"}
    study.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    refused(run("scale", study, "--out", out), "there is no adapter nowhere/x")
    assert not out.exists()
    assert run("scale", study, "--out", out, "--only", "dense").code == 0
