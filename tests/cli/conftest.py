"""The command line as a function, a tiny random model on disk and an adapter for it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Outcome, save_model, write_adapter
from sparsekv.cli import main as cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the script's entry point with these words."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["sparsekv", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "tiny")
