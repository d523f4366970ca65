"""suite by parts: the rows that were asked for, each written as it is measured."""

import json
from dataclasses import replace

import pytest
import torch

from bench.test_serve import TINY
from sparsekv.bench import serve, suite


def test_rows_of_serve_are_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "WORKS", [TINY, replace(TINY, name="other")])
    lines = []
    suite.run(torch.device("cpu"), torch.float32, lines.append, parts=["other"])
    assert [line["work"] for line in lines] == ["start", "other"]
    with pytest.raises(ValueError, match="unknown row 'no'; use some of tiny, other"):
        suite.run(torch.device("cpu"), torch.float32, lines.append, parts=["no"])


def test_lines_are_added_with_the_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "run", lambda device, dtype, keep, parts: [keep({"part": part}) for part in parts])
    out = tmp_path / "out" / "found.jsonl"
    assert suite.main([str(out), "abc", "steps", "long-8"]) == suite.main([str(out), "abc", "kernels"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == [{"part": part, "commit": "abc"} for part in ("steps", "long-8", "kernels")]
