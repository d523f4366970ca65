"""A tiny model whose chains end, two toy tasks for it, and a study of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

import tiny
from helpers import tiny_model
from sparsekv.evals.problems import tasks
from sparsekv.evals.problems.base import Problem

REAL = tasks.get


@dataclass(frozen=True)
class Voted:
    """An answer is how many words a chain has, modulo 3."""

    name: str = "toy-voted"
    voted: ClassVar[bool] = True

    def problems(self, split: str, count: int) -> list[Problem]:
        return [
            Problem(task=self.name, name=f"{self.name}/{split}/{i}", prompt=tiny.text(4, seed=i), data={"want": i % 3})
            for i in range(min(count, 12))
        ]

    def extract(self, text: str) -> str | None:
        return str(len(re.findall(r"\w+", text)) % 3)

    def right(self, problem: Problem, answer: str) -> bool:
        return answer == str(problem.data["want"])


@dataclass(frozen=True)
class Verified(Voted):
    """As above, and any right chain is enough."""

    name: str = "toy-verified"
    voted: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {task.name: task for task in (Voted(), Verified())}
    monkeypatch.setattr(tasks, "get", lambda name: known[name] if name in known else REAL(name))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale") / "model"
    text = tiny.tokenizer()
    made = tiny_model(vocab_size=512, max_position_embeddings=256)
    with torch.no_grad():
        made.lm_head.weight[text.eos_token_id] *= 5
    made.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture
def write(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The study's file, with these changes."""

    def make(name: str = "study", **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        values = {
            "model": str(model),
            "policies": ["dense", "tova", "random"],
            "ratios": [2],
            "tasks": ["toy-voted", "toy-verified"],
            "widths": [1, 2, 4],
            "lengths": [8, 24],
            "problems": 6,
            "batch": 2,
            "kv_memory": "16MiB",
        }
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return make
