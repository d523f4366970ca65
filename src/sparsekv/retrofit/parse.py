"""YAML into frozen dataclasses: unknown keys are refused, and every mistake is one sentence that names the key."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from sparsekv import yaml_file


def read_yaml(path: str | Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's keys with `key=value` overrides (dotted keys reach inside: `evaluation.items=8`).

    Raises ValueError for a missing file, what holds no keys or one twice, or an override without a value.
    """
    raw = yaml_file.read(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no keys; see configs/smollm2-135m.yaml for an example")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override} has no '='; write --set key=value")
        try:
            value = yaml_file.load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {override}: the value is not YAML; put it in quotes") from None
        _assign(raw, key.strip(), value)
    return raw


def parse(cls: Any, raw: Any, *, prefix: str = "") -> Any:
    """A dataclass from a plain dictionary. Raises ValueError for unknown or missing keys, or a value of another kind;
    prefix: what its keys are called by, such as "evaluation."."""
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {raw!r}; it holds keys")
    known = {f.name: f.type for f in fields(cls)}
    unknown = sorted(str(key) for key in set(raw) - set(known))
    if unknown:
        names, all_names = (", ".join(prefix + key for key in keys) for keys in (unknown, known))
        raise ValueError(f"unknown key {names}; the keys are {all_names}")
    values = {key: _convert(prefix + key, known[key], value) for key, value in raw.items()}
    try:
        return cls(**values)
    except TypeError as error:  # "missing 1 required keyword-only argument: 'model'"
        missing = ", ".join(prefix + part for part in str(error).split("'")[1::2])
        raise ValueError(f"the configuration lacks {missing}; add it to the file or pass --set") from None


def _assign(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise ValueError(f"--set {dotted}: {parent} holds a value, not keys")
    raw[last] = value


def _convert(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if is_dataclass(kind):
        return parse(kind, value, prefix=name + ".")
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [_convert(name, get_args(kind)[0], item) for item in items]
    refusal = ValueError(f"{name} is {value!r}; it is {_KINDS[kind]}")
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) != (kind is bool):
        raise refusal
    if kind is int and not (isinstance(value, int) or isinstance(value, float) and value.is_integer()):
        raise refusal
    try:
        return kind(value)  # YAML reads 3e-3 as a string: float() mends it
    except (TypeError, ValueError):
        raise refusal from None


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
