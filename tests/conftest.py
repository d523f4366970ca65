"""Settings of every test: one thread a worker (pytest-xdist runs several), and hypothesis without a clock. Fixtures: a
tiny model's folder with texts, and the configuration of a run that takes a second."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from sparsekv.retrofit.config import RetrofitConfig

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

# Without a GPU, kernels run in Triton's interpreter, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A deadline measures the machine, not the code. In CI the examples are the same in every run. Half of hypothesis' own
# number of examples: the whole suite is run often.
settings.register_profile("sparsekv", deadline=None, derandomize="CI" in os.environ, max_examples=50)
settings.load_profile("sparsekv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that no worker has one left when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What all tests have imported stays: a full collection, of which the engine and Trainer ask for many, would look
    through it each time, for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> "Callable[..., RetrofitConfig]":
    def build(**changes: Any) -> "RetrofitConfig":
        from sparsekv.retrofit.config import parse_config

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
