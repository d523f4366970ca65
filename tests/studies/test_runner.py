"""The runner of grids of runs: order, groups, what fails, and what is there already."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from making import dies, fails, made
from sparsekv.json_lines import read_lines
from sparsekv.studies.runner import failures_of, run_cells
from sparsekv.studies.workers import Line


def names(lines: Sequence[Line]) -> list[str]:
    return [line["cell"] for line in lines]


def test_a_cell_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    results, flag, said = tmp_path / "r.jsonl", tmp_path / "flag", list[str]()
    groups = [{"a": partial(fails, flag), "b": partial(made, 2)}, {"c": partial(made, 3)}]
    assert run_cells(groups, results, about={"commit": "abc"}, say=said.append) == ["a"]
    assert names(read_lines(results)) == ["b", "c"]
    (failure,) = read_lines(failures_of(results))
    assert (failure["cell"], failure["commit"], failure["error"]) == ("a", "abc", "RuntimeError: out of memory")
    assert "in fails" in failure["traceback"]
    assert any("a failed" in text for text in said)
    flag.touch()
    before = results.read_text()
    assert run_cells(groups, results, say=said.append) == []
    assert results.read_text().startswith(before)
    assert names(read_lines(results)) == ["b", "c", "a"]


def test_no_cell_begins_after_the_seconds(tmp_path: Path) -> None:
    said = list[str]()
    groups = [{"a": partial(made, 1)}, {"b": partial(made, 2)}]
    assert run_cells(groups, tmp_path / "r.jsonl", seconds=0, say=said.append) == []
    assert not (tmp_path / "r.jsonl").exists()
    assert said == ["The 0 seconds are over, left out: a", "The 0 seconds are over, left out: b"]


@pytest.mark.slow
def test_a_process_that_fails_or_dies_is_replaced(tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    groups = [{"a": partial(fails, tmp_path / "none"), "b": dies}, {"c": partial(made, 3)}]
    assert sorted(run_cells(groups, results, processes=2, say=lambda text: None)) == ["a", "b"]
    (line,) = read_lines(results)
    assert line["cell"] == "c"
    assert line["process"] != os.getpid()
    errors = {line["cell"]: line["error"] for line in read_lines(failures_of(results))}
    assert errors["a"] == "RuntimeError: out of memory"
    assert errors["b"].startswith("its process died")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"cell": "a"}) + "\nno json\n")
    with pytest.raises(ValueError, match="no file of JSON lines"):
        run_cells([{"a": partial(made, 1)}], tmp_path / "r.jsonl")
