"""`sparsekv serve --engine vllm`: what it becomes, without vLLM. tests_vllm drives that server itself."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sparsekv.cli import serve_vllm


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that the process would have become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: name)
    monkeypatch.setattr(serve_vllm.os, "execv", lambda path, words: (commands.append(words), sys.exit(0)))
    return commands


def test_the_server_of_vllm_with_the_plugin(
    run: Any, model_folder: Path, adapter_folder: Path, became: list[list[str]]
) -> None:
    mine = ["--adapter", adapter_folder, "--cr", 2, "--engine", "vllm", "--port", 8123, "--name", "small"]
    result = run("serve", model_folder, *mine, "--", "--tensor-parallel-size", "2", "--max-num-batched-tokens", "512")
    assert result.code == 0
    ((python, _, module, *words),) = became
    assert (python, module) == (sys.executable, "vllm.entrypoints.openai.api_server")
    assert words[:2] == ["--model", str(model_folder)]
    given = dict(pairwise(words))
    assert given["--load-format"] == "sparsekv"
    assert (given["--port"], given["--served-model-name"], given["--tensor-parallel-size"]) == ("8123", "small", "2")
    assert given["--max-num-batched-tokens"] == "512"  # the last one counts: the user's
    settings = json.loads(given["--additional-config"])["sparsekv"]
    assert (settings["adapter"], settings["cr"]) == (str(adapter_folder), 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "vllm", "--kv-memory", "1GiB"], "--kv-memory is for our own engine; give vLLM's options behind"),
        (["--", "--tensor-parallel-size", "2"], "Options of vLLM go with --engine vllm"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    run: Any, model_folder: Path, became: list[list[str]], arguments: list[str], says: str
) -> None:
    policy = ["--policy", "streaming", "--budget", 64]
    result = run("serve", model_folder, *policy, *arguments)
    assert result.code == 2
    assert says in result.err
    assert became == []


def test_without_vllm_it_says_what_to_install(run: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: None)
    result = run("serve", model_folder, "--policy", "streaming", "--budget", 64, "--engine", "vllm")
    assert result.code == 2
    assert "pip install 'sparsekv[vllm]'" in result.err
