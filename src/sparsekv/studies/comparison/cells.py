"""The cells of a comparison: one method at one ratio, each giving JSON lines with commit, hardware and seed."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from sparsekv.evals.corpus import load_documents
from sparsekv.evals.methods.measure import DENSE, Bench
from sparsekv.evals.methods.rows import Row
from sparsekv.evals.methods.setting import Setting
from sparsekv.modeling.attach import detach
from sparsekv.modeling.load import load_model
from sparsekv.provenance import environment
from sparsekv.studies.comparison.speed import timed
from sparsekv.studies.comparison.study import Method, Study, load_study
from sparsekv.studies.runner import Line

Cells = dict[str, Callable[[], Sequence[Line]]]


def quality_cells(file: Path) -> Cells:
    """Of a study's file, by name: `dense`, `tova at 4`, `dms-quest at 4 reading 0.25`; for any process to make.

    Raises ValueError as load_study does.
    """
    study = load_study(file)
    cells: Cells = {"dense": partial(_dense, file)}
    for ratio in study.ratios:
        for method in study.methods:
            first = method.reads[0] if method.reads else None
            name = f"{method.name} at {ratio:g}"
            cells[name] = partial(_quality, file, method, ratio, first)
            for share in method.reads[1:]:
                cells[f"{name} reading {share:g}"] = partial(_quality, file, method, ratio, share, text_only=True)
    return cells


def speed_cells(file: Path, *, lock: Path) -> Cells:
    """`speed of dense`, `speed of tova`, ... lock: as in speed.timed."""
    study = load_study(file)
    if study.speed is None:
        return {}
    methods: dict[str, Method | None] = {DENSE.policy: None} | {method.name: method for method in study.methods}
    return {f"speed of {name}": partial(_speed, study, method, lock) for name, method in methods.items()}


def _dense(file: Path) -> list[Line]:
    study, _, rows = _bench(file)
    return [_line(study, DENSE.policy, row, None) for row in rows]


def _quality(file: Path, method: Method, ratio: float, reads: float | None, *, text_only: bool = False) -> list[Line]:
    study, bench, _ = _bench(file)
    setting = study.setting(method, ratio=ratio, reads=reads)
    setting.attach(bench.model)
    try:
        bench.check([setting])
        return [_line(study, method.name, row, reads) for row in bench.rows(setting, text_only=text_only)]
    finally:
        detach(bench.model)


@cache
def _bench(file: Path) -> tuple[Study, Bench, list[Row]]:
    """This process's, and dense's rows: others are compared with what dense gives in the same process."""
    study = load_study(file)
    model, tokenizer = load_model(study.model)
    Setting().attach(model)
    try:
        documents = load_documents([study.text])[1]
        bench = Bench(model, tokenizer, documents=documents, others={}, config=study.config)
        return study, bench, list(bench.rows(DENSE))
    finally:
        detach(model)


def _line(study: Study, method: str, row: Row, reads: float | None) -> Line:
    return {"kind": "quality", "model": study.model, "method": method, "reads": reads, **row.to_dict(), **_where()}


def _speed(study: Study, method: Method | None, lock: Path) -> list[Line]:
    speed = study.speed
    assert speed is not None
    reads = method.reads[0] if method and method.reads else None
    setting = DENSE if method is None else study.setting(method, ratio=speed.ratio, reads=reads)
    about = {"kind": "speed", "model": study.model, "method": method.name if method else DENSE.policy, "reads": reads}
    about |= {"policy": setting.policy, "cr": setting.cr, "seed": study.seed}
    return [about | line | _where() for line in timed(study, speed, setting, lock=lock)]


@cache
def _where() -> dict[str, Any]:
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
