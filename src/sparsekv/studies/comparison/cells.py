"""The cells of a comparison: one method at one ratio, each giving JSON lines with commit, hardware and seed."""

from collections.abc import Sequence
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
from sparsekv.studies.locks import held
from sparsekv.studies.workers import Cell, Line

Cells = dict[str, Cell]


def grouped_cells(file: Path, *, shared: Path) -> list[Cells]:
    """Of a study's file, by name, for any process to make, in groups of which the next begins when one is over: quality
    at the first ratio, then speed, for which the machine must be quiet, then quality at the other ratios.

    shared: a folder for what the processes of one run tell each other. Raises ValueError as load_study does.
    """
    study = load_study(file)
    first, *others = study.ratios
    dense: Cells = {"dense": partial(_dense, file, shared)}
    groups = [dense | _quality_cells(file, study, [first], shared), _speed_cells(study, shared)]
    return [cells for cells in (*groups, _quality_cells(file, study, others, shared)) if cells]


def _quality_cells(file: Path, study: Study, ratios: Sequence[float], shared: Path) -> Cells:
    """`tova at 4`, `dms-quest at 4 reading 0.25`."""
    cells: Cells = {}
    for ratio in ratios:
        for method in study.methods:
            first = method.reads[0] if method.reads else None
            name = f"{method.name} at {ratio:g}"
            cells[name] = partial(_quality, file, shared, method, ratio, first)
            for share in method.reads[1:]:
                cells[f"{name} reading {share:g}"] = partial(
                    _quality, file, shared, method, ratio, share, text_only=True
                )
    return cells


def _speed_cells(study: Study, shared: Path) -> Cells:
    """`speed of dense`, `speed of tova`, ..."""
    if study.speed is None:
        return {}
    methods: dict[str, Method | None] = {DENSE.policy: None} | {method.name: method for method in study.methods}
    return {f"speed of {name}": partial(_speed, study, method, shared) for name, method in methods.items()}


def _dense(file: Path, shared: Path) -> list[Line]:
    study, _, rows = _bench(file, shared)
    return [_line(study, DENSE.policy, row, None) for row in rows]


def _quality(
    file: Path, shared: Path, method: Method, ratio: float, reads: float | None, *, text_only: bool = False
) -> list[Line]:
    study, bench, _ = _bench(file, shared)
    setting = study.setting(method, ratio=ratio, reads=reads)
    setting.attach(bench.model)
    try:
        bench.check([setting])
        return [_line(study, method.name, row, reads) for row in bench.rows(setting, text_only=text_only)]
    finally:
        detach(bench.model)
        torch.cuda.empty_cache()  # other processes share the memory


@cache
def _bench(file: Path, shared: Path) -> tuple[Study, Bench, list[Row]]:
    """This process's, and dense's rows, which the run's first process measures for all."""
    study = load_study(file)
    model, tokenizer = load_model(study.model)
    Setting().attach(model)
    try:
        documents = load_documents([study.text])[1]
        bench = Bench(model, tokenizer, documents=documents, others={}, config=study.config)
        return study, bench, _dense_rows(bench, shared)
    finally:
        detach(model)


def _dense_rows(bench: Bench, shared: Path) -> list[Row]:
    """Measured once in a run; others are compared with what was kept of it."""
    kept = shared / "dense.pt"
    with held(shared / "dense.lock"):
        if kept.exists():
            rows, bench.baseline = torch.load(kept, map_location=bench.device, weights_only=False)  # our own
        else:
            rows = list(bench.rows(DENSE))
            torch.save((rows, bench.baseline), kept)
    return rows


def _line(study: Study, method: str, row: Row, reads: float | None) -> Line:
    return {"kind": "quality", "model": study.model, "method": method, "reads": reads, **row.to_dict(), **_where()}


def _speed(study: Study, method: Method | None, shared: Path) -> list[Line]:
    speed = study.speed
    assert speed is not None
    reads = method.reads[0] if method and method.reads else None
    setting = DENSE if method is None else study.setting(method, ratio=speed.ratio, reads=reads)
    about = {"kind": "speed", "model": study.model, "method": method.name if method else DENSE.policy, "reads": reads}
    about |= {"policy": setting.policy, "cr": setting.cr, "seed": study.seed}
    return [about | line | _where() for line in timed(study, speed, setting, lock=shared / "clock")]


@cache
def _where() -> dict[str, Any]:
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
