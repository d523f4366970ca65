"""docs/retrofit.md names every option with its default."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsekv.retrofit.config import RetrofitConfig

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"
ELSEWHERE = {"calibration", "evaluation"}


def options(cls: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if is_dataclass(default) and f.name not in ELSEWHERE:
            found |= options(type(default), f"{f.name}.")
        else:
            found[prefix + f.name] = "required" if default is MISSING else default
    return found


def test_every_option_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| (.+?) \|", PAGE.read_text(), flags=re.MULTILINE)
    documented = {key: default.strip("`") for key, default in rows}
    known = options(RetrofitConfig)
    assert set(documented) == set(known)
    for key, default in known.items():
        if key not in ELSEWHERE:
            assert yaml.safe_load(documented[key]) == default, key


def test_every_recipe_it_names_is_there() -> None:
    root = PAGE.parents[1]
    named = set(re.findall(r"(?:configs|examples)/[\w./-]+\.(?:yaml|sh)", PAGE.read_text()))
    assert len(named) >= 8
    assert all((root / path).is_file() for path in named)
