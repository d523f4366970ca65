"""`--config x.yaml` for every command: a flat file of the command's own options; the command line wins over it.

Unknown keys are errors. Commands that write results save what was resolved beside them, for `--config` to read again.
"""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from sparsekv import yaml_file

RESOLVED_FILE = "config.yaml"
_NAME = "config"


def with_config(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function the option --config, unless it has a parameter of that name. Texts that are not UTF-8,
    which Python passes on in pieces, are refused."""
    signature = inspect.signature(function, eval_str=True)
    if _NAME in signature.parameters:
        return function
    option = inspect.Parameter(
        _NAME,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                is_eager=True,
                callback=_read,
                help="YAML file of these options; the command line wins, unknown keys are errors.",
            ),
        ],
    )

    @functools.wraps(function)
    def command(*args: Any, config: Path | None = None, **kwargs: Any) -> Any:
        _check_texts(kwargs)
        return function(*args, **kwargs)

    setattr(command, "__signature__", signature.replace(parameters=[*signature.parameters.values(), option]))  # noqa: B010
    return command


def save_resolved(ctx: typer.Context, folder: Path) -> None:
    """Write the options of the command under way, defaults included, to config.yaml in `folder`."""
    names = {name: key for key, name in _keys(ctx).items()}
    values = {names[name]: _plain(value) for name, value in ctx.params.items() if name in names}
    text = f"# {ctx.command_path}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    (folder / RESOLVED_FILE).write_text(text, encoding="utf-8")


def _check_texts(values: dict[str, Any]) -> None:
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{name.replace('_', '-')} is not UTF-8: give it as UTF-8 text")


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command."""
    if path is None:
        return None
    raw = yaml_file.read(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold `option: value` lines")
    keys = _keys(ctx)
    unknown = sorted(str(key) for key in raw if str(key).replace("_", "-") not in keys)
    if unknown:
        known = ", ".join(sorted(keys))
        raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}; `{ctx.command_path}` knows {known}")
    ctx.default_map = {keys[str(key).replace("_", "-")]: value for key, value in raw.items() if value is not None}
    return path


def _keys(ctx: typer.Context) -> dict[str, str]:
    """Key in a file -> parameter: the long options without dashes, and the names of arguments."""
    parameters = [p for p in ctx.command.params if p.name not in (_NAME, "help")]
    arguments = {p.name.replace("_", "-"): p.name for p in parameters if p.param_type_name == "argument"}
    return arguments | {flag[2:]: p.name for p in parameters for flag in p.opts if flag.startswith("--")}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
