"""How the kernels of gate.triton are cut: a fixed table by head size, none of it by length."""

from dataclasses import dataclass

import torch

from sparsekv.ops.device import shared_memory


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Of one kernel. Queries and keys in a tile are powers of two, at least 16."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The forward, and the backward by block of queries (dQ) and by block of keys (dK, dV, the gate's)."""

    forward: Cut
    by_query: Cut
    by_key: Cut

    def flat(self) -> list[int]:
        """As a custom op takes it."""
        cuts = (self.forward, self.by_query, self.by_key)
        return [n for cut in cuts for n in (cut.queries, cut.keys, cut.warps, cut.stages)]

    @staticmethod
    def of(flat: list[int]) -> "GateConfig":
        """The inverse of flat."""
        cuts = [
            Cut(queries=flat[i], keys=flat[i + 1], warps=flat[i + 2], stages=flat[i + 3])
            for i in range(0, len(flat), 4)
        ]
        return GateConfig(forward=cuts[0], by_query=cuts[1], by_key=cuts[2])


_EXACT = GateConfig(  # float32: exact products run on the ordinary units
    forward=Cut(queries=32, keys=32, warps=4, stages=1),
    by_query=Cut(queries=32, keys=32, warps=4, stages=1),
    by_key=Cut(queries=16, keys=32, warps=4, stages=1),
)
_TABLE = {
    64: GateConfig(
        forward=Cut(queries=128, keys=32, warps=4, stages=4),
        by_query=Cut(queries=64, keys=128, warps=4, stages=2),
        by_key=Cut(queries=64, keys=64, warps=4, stages=3),
    ),
    128: GateConfig(
        forward=Cut(queries=64, keys=64, warps=4, stages=3),
        by_query=Cut(queries=64, keys=64, warps=4, stages=2),
        by_key=Cut(queries=64, keys=64, warps=4, stages=2),
    ),
    256: GateConfig(
        forward=Cut(queries=64, keys=32, warps=4, stages=2),
        by_query=Cut(queries=128, keys=32, warps=8, stages=2),
        by_key=Cut(queries=64, keys=64, warps=8, stages=2),
    ),
}
"""By the head size rounded up; tuned on an H100."""
_SMALL = GateConfig(
    forward=Cut(queries=64, keys=32, warps=4, stages=1),
    by_query=Cut(queries=32, keys=32, warps=4, stages=1),
    by_key=Cut(queries=16, keys=32, warps=4, stages=1),
)
"""For devices with less."""
H100_BYTES = 227 * 1024


def config_of(dim: int, dtype: torch.dtype, *, device: torch.device) -> GateConfig:
    """The configuration for a head size and a type."""
    if dtype == torch.float32:
        return _EXACT
    if shared_memory(device) < H100_BYTES:
        return _SMALL
    return next(config for size, config in _TABLE.items() if dim <= size)
