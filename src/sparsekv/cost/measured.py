"""How far measured decode steps are from the cost model: the rows "step" of a results file of sparsekv.bench.

The prediction is a floor (datasheet bandwidth, nothing but weights and live keys and values): measured / predicted is
above 1 where both are right.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsekv.cost.hardware import HARDWARE, Hardware
from sparsekv.cost.model import step_seconds
from sparsekv.cost.shapes import ALIASES, SHAPES, ModelShape


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured step; milliseconds."""

    shape: str
    gpu: str
    batch: int
    context: int
    ratio: float
    """Tokens seen / tokens held while it was measured."""
    predicted_ms: float
    measured_ms: float
    commit: str | None
    """Of the code that was measured."""

    @property
    def over(self) -> float:
        """Measured over predicted."""
        return self.measured_ms / self.predicted_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"over": self.over}


def against_measured(
    rows: Iterable[Mapping[str, Any]], *, shape: ModelShape | None = None, hardware: Hardware | None = None
) -> list[Measured]:
    """Every step of a known shape on a known device, in the file's order; of this shape, on this device alone."""
    candidates = HARDWARE.values() if hardware is None else [hardware]
    devices = {candidate.device: candidate for candidate in candidates if candidate.device}
    found = []
    for row in (row for row in rows if row["bench"] == "step"):
        name: str = row["shape"]
        model, device = SHAPES.get(ALIASES.get(name) or name), devices.get(row["hardware"])
        if model is None or device is None or shape not in (None, model):
            continue
        sizes = {key: row[key] for key in ("batch", "context", "ratio")}
        found.append(
            Measured(
                shape=model.name,
                gpu=device.name,
                **sizes,
                predicted_ms=1e3 * max(step_seconds(model, device, **sizes)),
                measured_ms=row["ms"],
                commit=row.get("commit"),
            )
        )
    return found
