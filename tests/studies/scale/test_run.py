"""A study from its file to its report: one draw for all W and L, what a kill leaves, what does not fit."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from scoring import Server, steps
from sparsekv.markdown import markers
from sparsekv.studies.scale.draws import Draws
from sparsekv.studies.scale.report.page import BLOCK, report
from sparsekv.studies.scale.report.scores import score
from sparsekv.studies.scale.report.tables import tables
from sparsekv.studies.scale.run import lacking, run
from sparsekv.studies.scale.study import Study, load_study

Write = Callable[..., Path]


def quiet(text: str) -> None:
    pass


def drawn(study: Study, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The problems' lines of each cell, without what a clock says."""
    return {
        cell.name: [{k: v for k, v in line.items() if k != "seconds"} for line in Draws.of(out, cell).read()[1]]
        for cell in study.cells()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all tests that need the study's draws: the first to run it makes them."""
    return tmp_path_factory.mktemp("whole")


def test_one_draw_serves_every_length_and_width(write: Write, tmp_path: Path) -> None:
    large = load_study(write(ratio_tokens=24))  # else a budget is of the largest L
    assert run(large, tmp_path / "large", say=quiet)
    small = load_study(write("small", lengths=[8], widths=[1, 4], ratio_tokens=24))
    assert run(small, tmp_path / "small", say=quiet)
    for cut, alone in zip(tables(small, tmp_path / "large"), tables(small, tmp_path / "small"), strict=True):
        assert np.array_equal(cut.accuracy, alone.accuracy)
        for name in ("reads", "peak_tokens", "peak_bytes", "tokens"):
            assert np.array_equal(cut.costs[name], alone.costs[name])
    accuracy = {t.cell.name: t.accuracy for t in tables(large, tmp_path / "large")}
    passed = accuracy["dense/toy-verified/0"]
    assert (np.diff(passed, axis=1) >= 0).all()
    assert (np.diff(passed, axis=2) >= 0).all()
    assert passed.max() > 0


def test_more_tokens_cost_more_and_a_budget_bounds_the_peak(write: Write, whole: Path) -> None:
    study = load_study(write())
    run(study, whole, say=quiet)
    for table in tables(study, whole):
        for cost in table.costs.values():
            assert (np.diff(cost, axis=2) >= 0).all()
            assert np.allclose(cost[:, 2], 4 * cost[:, 0])
        if table.cell.method.policy == "tova":
            dense = next(t for t in tables(study, whole) if t.cell.name == f"dense/{table.cell.task}/0")
            assert (table.costs["reads"] <= dense.costs["reads"]).mean() > 0.5
    seconds = sum(t.costs["seconds"][:, 2, -1].sum() for t in tables(study, whole))
    assert seconds > 0


def test_what_a_kill_leaves_is_gone_on_from(write: Write, whole: Path, tmp_path: Path) -> None:
    study = load_study(write())
    run(study, whole, say=quiet)
    batches = 0

    def killed(text: str) -> None:
        nonlocal batches
        batches += "problems" in text
        if batches == 5:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(study, out, say=killed)
    before = drawn(study, out)
    assert [len(lines) for lines in before.values()] == [6, 4, 0, 0, 0, 0]
    second = Draws.of(out, list(study.cells())[1]).path
    with second.open("a") as file:
        file.write('{"problem": "toy-ver')  # cut by the kill
    assert len(lacking(study, out, only=None)) == 5
    assert second.read_text().endswith("toy-ver")  # as it would be where another process were writing it
    assert run(study, out, seconds=0, say=quiet) is False
    assert len(drawn(study, out)["dense/toy-verified/0"]) == 6
    assert run(study, out, only=["tova@2"], say=quiet)
    assert [cell.key for cell in lacking(study, out, only=None)] == ["random@2"] * 2
    assert run(study, out, say=quiet)
    assert drawn(study, out) == drawn(study, whole)
    more = load_study(write("more", problems=8, tasks=["toy-voted"]))
    assert run(more, out, only=["dense"], say=quiet)
    assert len(drawn(more, out)["dense/toy-voted/0"]) == 8


def test_processes_share_a_folder(write: Write, whole: Path, tmp_path: Path) -> None:
    """What another one draws is left to it, and drawn by whoever comes when it has been killed."""
    study = load_study(write())
    run(study, whole, say=quiet)
    first = next(study.cells())
    with Draws.of(tmp_path, first).claimed() as mine:
        assert mine
        assert not run(study, tmp_path, say=quiet)
        assert [cell.name for cell in lacking(study, tmp_path, only=None)] == [first.name]
    assert run(study, tmp_path, say=quiet)
    assert drawn(study, tmp_path) == drawn(study, whole)


def test_the_report_is_whole(write: Write, whole: Path, tmp_path: Path) -> None:
    run(load_study(write()), whole, say=quiet)
    study, out, page = load_study(write(seeds=[0, 1], commit="abc")), tmp_path / "out", tmp_path / "page.md"
    copytree(whole, out)
    run(study, out, say=quiet)
    nowhere = min((out / "draws").glob("*~1.jsonl"))  # drawn where there was no git to ask
    nowhere.write_text(nowhere.read_text().replace('"commit": "abc"', '"commit": null'))
    begin, end = markers(BLOCK)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    found = report(study, out, markdown=page)
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert "http" not in html.replace("http-equiv", "")
    assert (tmp_path / "img" / "page-reads.png").stat().st_size > 5000
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| tova - dense | mean over voted tasks |" in text
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == found["results"]
    assert len(lines) == 3 * 2 * 3 * 2
    assert all(line["low"] <= line["accuracy"] <= line["high"] for line in lines)
    assert all(line["hardware"] and line["commit"] and line["seeds"] == [0, 1] for line in lines)
    assert {line["commit"].split(", ")[-1] for line in lines} == {"abc", "unknown"}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_a_scorer_that_is_down_loses_nothing(write: Write, tmp_path: Path, server: Server) -> None:
    scorer = {"url": server.url, "model": "prm", "tries": 2, "pause": 0.01, "parallel": 1}
    study = load_study(write(policies=["dense"], rule="best", scorer=scorer))
    run(study, tmp_path, say=quiet)
    kept = drawn(study, tmp_path)
    server.replies = [(200, steps(0.5))] * 5 + [(500, b"")]
    with pytest.raises(ValueError, match="did not answer in 2 tries"):
        score(study, tmp_path, say=quiet)
    with pytest.raises(ValueError, match="has no scores of toy-voted/test/"):
        report(study, tmp_path)
    server.replies = [(200, steps(0.5))]
    score(study, tmp_path, say=quiet)
    assert drawn(study, tmp_path) == kept
    equal = tables(study, tmp_path)[0].accuracy  # equal scores: any chain with an answer
    assert 0 < equal.mean() < 1
    asked = len(server.seen)
    score(study, tmp_path, say=quiet)
    assert len(server.seen) == asked
    report(study, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policies": ["lru"]}, "unknown policy 'lru'"),
        ({"policies": []}, "grid is empty: name policies"),
        ({"policies": {"tova": {"colour": 1}}}, "'tova' has unknown keys colour"),
        ({"policies": ["dms"]}, "needs trained eviction heads"),
        ({"ratios": []}, "grid is empty: 'tova' has no ratios"),
        ({"ratios": [0.5]}, "cr is 0.5"),
        ({"tasks": ["chess-3"]}, "there is no task 'chess-3'"),
        ({"tasks": []}, "grid is empty: tasks is"),
        ({"tasks": ["toy-voted", "toy-voted"]}, "name a value twice"),
        ({"lengths": []}, "grid is empty: lengths is"),
        ({"widths": [0, 1]}, "widths are"),
        ({"problems": 0}, "problems is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"kv_memory": 2.0}, "kv_memory"),
        ({"colour": 1}, "unknown keys: colour; a study has model, policies"),
        ({"rule": "luck"}, "rule is 'luck'; use one of vote, weighted, best"),
        ({"rule": "best"}, "need a scorer"),
        ({"rule": "best", "scorer": {"url": "http://x"}}, "the study's scorer: missing"),
        ({"scorer": {"url": "http://x", "model": "m"}}, "need a scorer"),
    ],
)
def test_a_study_that_does_not_fit_is_one_sentence(write: Write, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        load_study(write(**changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"widths": [1, 8]}, "holds draws of 4 chains and the study asks for W = 8"),
        ({"lengths": [8, 16]}, "holds draws cut at L = 8, 24 and the study asks for 16 too"),
        ({"temperature": 0.5}, "drawn with temperature 1.0 and the study says 0.5"),
        ({"split": "validation"}, "drawn with split test and the study says validation"),
        ({"problems": 20}, "the task toy-voted has 12 problems and the study asks for 20"),
        ({"lengths": [8, 24, 2000]}, "and the study asks for 2000 too"),
    ],
)
def test_draws_of_another_study_are_refused(write: Write, whole: Path, changes: dict[str, Any], sentence: str) -> None:
    study = {"policies": ["dense"], "tasks": ["toy-voted"]}
    run(load_study(write(**study)), whole, say=quiet)
    files = {path: path.read_bytes() for path in whole.rglob("*.jsonl")}
    with pytest.raises(ValueError, match=sentence):
        run(load_study(write(**study | changes)), whole, say=quiet)
    assert {path: path.read_bytes() for path in whole.rglob("*.jsonl")} == files


def test_what_the_model_cannot_hold_is_one_sentence(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is .* and the model's context is 256"):
        run(load_study(write(lengths=[2000])), tmp_path, say=quiet)
    with pytest.raises(ValueError, match="holds no draws of this study"):
        report(load_study(write()), tmp_path)
    with pytest.raises(ValueError, match="no cell is called 'x'; the study has dense/toy-voted/0"):
        run(load_study(write()), tmp_path, only=["x"], say=quiet)
