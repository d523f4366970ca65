"""Retrofits by several processes: the bound, what a failure leaves, more heads, the page, a kill and a resume."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekv.json_lines import read_lines
from sparsekv.markdown import markers
from sparsekv.retrofit.__main__ import main as retrofit
from sparsekv.studies.processes import perform as performing
from sparsekv.studies.processes.__main__ import main
from sparsekv.studies.processes.compare import TIMES, compared, worst
from sparsekv.studies.processes.perform import perform
from sparsekv.studies.processes.report import BLOCK, block, write_page
from sparsekv.studies.processes.runs import RUNS, WAVES, widen

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/results/two-gpus.jsonl"


def line(name, losses):
    return {"run": name, "losses": losses}


ONE = [line("one", [1.0, 2.0, 4.0]), line("one-split", [1.0, 2.1, 4.0]), line("one-plain", [1.0, 2.0, 3.8])]


@pytest.mark.parametrize(("last", "within"), [(4.5, True), (4.7, False)])
def test_the_bound_is_a_multiple_of_the_worst_of_the_noise(last, within):
    found = compared("replicas", [1.0, 2.0, last], ONE)
    assert found["worst"] == pytest.approx(last - 4)
    assert found["bound"] == pytest.approx(TIMES * 0.2)
    assert found["within"] is within
    assert found["scale"] == 2
    assert "noise" not in found  # the line itself says whether the run is noise


def test_what_was_not_made_bounds_nothing():
    assert compared("one", [1.0], []) == {}
    assert compared("replicas", [1.0], [])["within"] is None
    assert compared("replicas", [1.0, 2.0, 4.0], ONE[:1])["bound"] is None
    assert compared("replicas", [1.0], [{"run": "one", "error": "killed"}])["worst"] is None
    with pytest.raises(ValueError, match="2 steps beside 3"):
        worst([1.0, 2.0], [1.0, 2.0, 3.0])


def test_every_run_is_made_once_after_what_it_is_compared_with():
    order = [name for wave in WAVES for name in wave]
    assert sorted(order) == sorted(RUNS)
    place = {name: i for i, wave in enumerate(WAVES) for name in wave}
    for name, run in RUNS.items():
        if run.like is not None and not run.noise:
            noises = [n for n, other in RUNS.items() if other.noise and other.like == run.like]
            assert noises and all(place[other] < place[name] for other in (run.like, *noises))
            assert all(RUNS[n].widened == run.widened and RUNS[n].trainable == run.trainable for n in noises)


def test_a_run_that_fails_is_a_line_and_is_tried_again(tmp_path, monkeypatch):
    made = []

    def launch(name, folder, **kwargs):
        made.append(name)
        if name == "all" and made.count(name) == 1:
            raise TimeoutError("not done after 240 s")
        return {"losses": [1.0, 2.0]}

    monkeypatch.setattr(performing, "_launch", launch)
    monkeypatch.setattr(performing, "_configure", lambda *args: None)
    names = ["one", "all", "one-split"]
    first = {found["run"]: found for found in perform(tmp_path, only=names)}
    assert first["all"]["error"] == "not done after 240 s"
    assert first["one-split"]["worst"] == 0
    perform(tmp_path, only=names)
    assert sorted(made) == sorted([*names, "all"])
    assert len(read_lines(tmp_path / "processes.jsonl")) == 4
    with pytest.raises(ValueError, match="unknown runs two; there are one"):
        perform(tmp_path, only=["two"])


def test_more_groups_of_heads_compute_the_same_logits(folder, tmp_path):
    wide = widen(str(folder), tmp_path / "wide", processes=4)
    plain, wider = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, wide))
    assert (plain.config.num_key_value_heads, wider.config.num_key_value_heads) == (2, 4)
    ids = torch.arange(40)[None] % 100
    torch.testing.assert_close(wider(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


SHARED = {"study": "processes", "like": None, "noise": False, "own_gpus": True, "trainable": "heads", "batch": 8}
SHARED |= {"length": 2048, "hardware": "a GPU", "torch": "2", "commit": "abc", "seed": 0, "memory_gib": 20.04}
SHARED |= {"seconds_per_step": 0.25, "losses": [1.0, 2.0]}
STEP = {"bench": "train together", "shape": "qwen3-8b", "trainable": "all", "layers": 36, "tokens": 8192, "seed": 0}
STEP |= {"extrapolated_from": None}


def sample():
    return [
        SHARED | {"run": "one", "way": "alone"},
        SHARED | {"run": "one-split", "way": "alone", "noise": True, "like": "one", "own_gpus": False, "worst": 1e-4},
        SHARED | {"run": "replicas", "way": "replicas", "like": "one", "error": "not done | 240 s"},
        SHARED
        | {"run": "replicas", "way": "replicas", "like": "one", "worst": 2e-4, "rounding": 1e-4, "bound": 3e-4}
        | {"within": True, "losses": [1.0, 2.5]},
        {"study": "processes", "run": "shards", "way": "shards", "trainable": "all", "like": "all", "noise": False}
        | {"error": "exit code 1: a | b"},
        STEP | {"way": "alone", "rows": 1, "error": "does not fit: CUDA out of memory"},
        STEP
        | {"way": "shards", "rows": 2, "ms": 2500.0, "tokens_per_s": 6553.6, "tflops": 400.0, "of_matmul": 0.5}
        | {"peak_bytes": 100 * 2**30, "hardware": "a GPU", "torch": "2", "commit": "abc"},
        STEP
        | {"way": "alone", "rows": 1, "ms": 3000.0, "tokens_per_s": 2730.0, "tflops": 390.0, "of_matmul": 0.49}
        | {"peak_bytes": None, "extrapolated_from": [4, 8], "hardware": "a GPU", "torch": "2", "commit": "abc"},
    ]


def test_the_page_has_the_latest_of_each_run_and_says_what_failed(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(found) + "\n" for found in sample()))
    begin, end = markers(BLOCK)
    page.write_text(f"before\n{begin}\nSTALE\n{end}\nafter\n")
    write_page(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"\n{end}\nafter\n") and "STALE" not in text
    assert "| replicas: two replicas, heads | one | 2.0e-04 | 3.0e-04 | yes | - | 0.250 | 20.0 |" in text
    assert "| one-split: one GPU, heads | one | 1.0e-04 | - | noise | - | - | 20.0 |" in text
    assert "`replicas` has the losses of `one-split` to the last bits in its first 1 steps" in text
    assert "| shards: FSDP2, all | all | failed: exit code 1: a / b | - | - | - | - | - |" in text
    assert "| all | one GPU | 36 | 1 | does not fit: CUDA out of memory | - | - | - | - |" in text
    assert "| all | FSDP2 | 36 | 2 | 2.50 | 6,554 | 400 | 50% | 100.0 |" in text
    assert "| all | one GPU | 36, from 4 and 8 | 1 | 3.00 | 2,730 | 390 | 49% | - |" in text
    with pytest.raises(ValueError, match="no line of"):
        block([{"bench": "step"}])


def test_the_published_tables_are_those_of_the_results():
    begin, end = markers(BLOCK)
    page = (ROOT / "docs/performance.md").read_text()
    shown = page.partition(begin)[2].partition(end)[0].strip("\n")
    assert shown == (block(read_lines(RESULTS)) if RESULTS.exists() else "Not measured yet.")


@pytest.mark.slow
def test_the_command_kills_and_resumes_two_replicas_which_lose_what_one_does(folder, tmp_path, monkeypatch):
    """The one in this process, which has imported all that it needs; the replicas as a user starts them."""
    start = performing.start

    def started(command, log, **kwargs):
        return start(command, log, **kwargs) if "torch.distributed.run" in command else retrofit(command[3:])

    monkeypatch.setattr(performing, "start", started)
    monkeypatch.chdir(ROOT)
    data = f"data=[{{kind: text, names: [{folder / 'texts'}]}}]"
    settings = [f"model={folder}", data, "device=cpu", "length=128", "window=8", "batch=4", "max_steps=8"]
    settings += ["save_every=2", "calibration={targets: [1.01], rows: 2, length: 128, lengths: []}"]
    pairs = [word for setting in settings for word in ("--set", setting)]
    assert main(["run", str(tmp_path), "--only", "one,replicas-killed", *pairs]) == 0
    one, replicas = read_lines(tmp_path / "processes.jsonl")
    assert len(one["losses"]) == len(replicas["losses"]) == 8
    assert replicas["killed_after"] >= 5 and 2 <= replicas["resumed_from"] < 8
    assert replicas["worst"] < 1e-5 < replicas["scale"]
