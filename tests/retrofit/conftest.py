"""A tiny model's folder with texts, and the configuration of a run that takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from sparsekv.retrofit.config import RetrofitConfig, parse_config


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Callable[..., RetrofitConfig]:
    def build(**changes: Any) -> RetrofitConfig:
        values = {
            "model": str(folder),
            "output": str(tmp_path / "out"),
            "data": [{"kind": "text", "names": [str(folder / "texts")]}, {"kind": "retrieval"}],
            "window": 8,
            "steps_per_cr": 2,
            "max_cr": 4,
            "batch": 2,
            "length": 512,
            "save_every": 2,
            "device": "cpu",
            "calibration": {"targets": [1.5, 2, 3], "rows": 2, "length": 128},
            "evaluation": None,
        }
        return parse_config(values | changes)

    return build
