"""--config: the file's values are defaults, the command line wins, unknown keys are errors, results say what ran."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner

from sparsekv.cli.config import save_resolved, with_config


@pytest.fixture
def called(tmp_path):
    """Runs a command with every kind of option and returns what it got, or its failure."""

    def command(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument()],
        out: Annotated[Path, typer.Option()] = Path("x"),
        max_tokens: Annotated[int, typer.Option()] = 3,
        chat: Annotated[bool | None, typer.Option("--chat/--raw")] = None,
        tags: Annotated[list[str] | None, typer.Option("--tag")] = None,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        got.update(name=name, out=out, max_tokens=max_tokens, chat=chat, tags=tags, as_json=as_json)
        save_resolved(ctx, tmp_path)

    got: dict[str, object] = {}
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("go")(with_config(command))

    def run(*words: object) -> dict[str, object]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(result.exception, ValueError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return dict(got)

    return run


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "given.yaml"
        file.write_text(text)
        return file

    return write


FULL = "name: a\nout: results\nmax-tokens: 7\nchat: false\ntag: [p, q]\njson: true\n"


def test_values_of_the_file_are_defaults(called, config):
    got = called("--config", config(FULL))
    assert got == {
        "name": "a",
        "out": Path("results"),
        "max_tokens": 7,
        "chat": False,
        "tags": ["p", "q"],
        "as_json": True,
    }
    assert called("--config", config("name: a\nmax_tokens: 8"))["max_tokens"] == 8


def test_the_command_line_wins(called, config):
    got = called("b", "--max-tokens", 9, "--config", config(FULL))
    assert (got["name"], got["max_tokens"], got["out"]) == ("b", 9, Path("results"))


def test_the_resolved_configuration_runs_the_same_again(called, config, tmp_path):
    first = called("--config", config(FULL), "--max-tokens", 5)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["max-tokens"] == 5
    assert saved["out"] == "results"
    assert called("--config", tmp_path / "config.yaml") == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nmaxtokens: 3", "unknown keys: maxtokens.*max-tokens"),
        ("- a", "option: value"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files(called, config, text, words):
    with pytest.raises(ValueError, match=words):
        called("--config", config(text))


def test_a_missing_file(called, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere.yaml"):
        called("--config", tmp_path / "nowhere.yaml")


def test_a_command_with_its_own_config_keeps_it():
    def command(config: str) -> None:
        pass

    assert with_config(command) is command


def test_a_key_that_is_written_twice_is_a_mistake(called, config):
    with pytest.raises(ValueError, match=r"given.yaml is not YAML: the key name appears twice, .* in line 3"):
        called("--config", config("name: a\nmax-tokens: 7\nname: b\n"))
