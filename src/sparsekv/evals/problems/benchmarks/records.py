"""A benchmark's rows, from a file (JSON, JSON lines, CSV, Parquet), a dataset's folder, or the hub."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a benchmark lies on the hub, and the columns that it needs there and in a file."""

    dataset: str
    columns: tuple[str, ...]
    subset: str | None = None
    split: str = "test"
    file: str | None = None
    """A file of the dataset, where it is no table that `datasets` knows."""


def read(source: Source, path: str | None) -> list[Row]:
    """The rows, in their order. path: a file or folder; None = the hub.

    Raises ValueError for what cannot be read, no rows, or a column that is missing.
    """
    rows = _from_hub(source) if path is None else _from_path(Path(path), source)
    name = path or source.dataset
    if not rows:
        raise ValueError(f"{name} holds no problems; name a file with one in each row")
    missing = [column for column in source.columns if column not in rows[0]]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]!r}; this benchmark's are {', '.join(source.columns)}")
    return rows


def named(benchmark: str, path: str | None) -> str:
    """A benchmark from the hub, or from a file: "math-500=math.jsonl"."""
    return benchmark if path is None else f"{benchmark}={path}"


def chosen(rows: Sequence[Any], split: str, count: int, *, name: str) -> list[Any]:
    """The first `count` of a benchmark's rows. Raises ValueError for a split but "test", and where there are fewer."""
    if split != "test":
        raise ValueError(f"{name} has no split {split!r}; a benchmark is all test")
    if count > len(rows):
        raise ValueError(f"{name} has {len(rows)} problems, not {count}; ask for at most so many")
    return list(rows[:count])


def _from_path(path: Path, source: Source) -> list[Row]:
    if path.is_dir():
        return _loaded(str(path), None, split=source.split)
    kinds = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise ValueError(f"{path} is no {', '.join(kinds)} file and no folder; give one of those")
    try:
        rows = kinds[path.suffix](path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no {path.suffix[1:]}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold objects, one a problem")
    return rows


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _json(path: Path) -> list[Row]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, list) else [found]


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _from_hub(source: Source) -> list[Row]:
    if source.file is not None:
        return _loaded("json", None, split="train", data_files=f"hf://datasets/{source.dataset}/{source.file}")
    return _loaded(source.dataset, source.subset, split=source.split)


def _loaded(name: str, subset: str | None, *, split: str, **options: Any) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} needs the package datasets; run pip install 'sparsekv[train]'") from None
    try:
        loaded: Any = datasets.load_dataset(name, subset, split=split, **options)
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load {options.get('data_files', name)} ({reason}); give a file of it instead"
        ) from None
    return [dict(row) for row in loaded]
