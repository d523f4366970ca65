"""What a device can do at most: named ones with their makers' figures, or a YAML file of one's own.

16-bit FLOP/s are dense (no 2:4 sparsity) and accumulate in float32. Memory is the datasheet's number of decimal GB;
what a device really shows is about 7 % more, which is about what activations, graphs and the driver take. Power is
the board's limit. Sources:

h100-sxm, h200, a100 (SXM, 80 GB), l40s: NVIDIA's datasheet of each.
b200: NVIDIA DGX B200 datasheet, an eighth of it (1,440 GB, 64 TB/s, 72 PFLOP/s of sparse FP8, a quarter of which are
dense 16-bit ones); 1,000 W.
rtx-4090: NVIDIA Ada GPU architecture whitepaper, appendix A.
cpu: one socket of Intel's Xeon Platinum 8480+: 56 cores of 2.0 GHz x 2,048 BF16 operations a cycle (AMX), eight
channels of DDR5-4800, TDP 350 W; 512 GB is what we put in. Other CPUs differ by a lot: write a file.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsekv import yaml_file


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Raises ValueError for a number that is not positive."""

    name: str
    flops: float
    """Peak 16-bit FLOP/s."""
    bandwidth: float
    """Bytes per second from memory."""
    memory: float
    """Bytes."""
    power: float
    """Watts."""
    device: str | None = None
    """What the driver calls it, as results files have it."""

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "memory", "power"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} of {self.name} is {value:g}; it is a number above 0")


_NAMED = [
    Hardware(
        name="h100-sxm", flops=989.5e12, bandwidth=3.35e12, memory=80e9, power=700, device="NVIDIA H100 80GB HBM3"
    ),
    Hardware(name="h200", flops=989.5e12, bandwidth=4.8e12, memory=141e9, power=700, device="NVIDIA H200"),
    Hardware(name="a100", flops=312e12, bandwidth=2.039e12, memory=80e9, power=400, device="NVIDIA A100-SXM4-80GB"),
    Hardware(name="b200", flops=2.25e15, bandwidth=8e12, memory=180e9, power=1000, device="NVIDIA B200"),
    Hardware(name="l40s", flops=362.05e12, bandwidth=864e9, memory=48e9, power=350, device="NVIDIA L40S"),
    Hardware(
        name="rtx-4090", flops=165.2e12, bandwidth=1.008e12, memory=24e9, power=450, device="NVIDIA GeForce RTX 4090"
    ),
    Hardware(name="cpu", flops=229.4e12, bandwidth=307.2e9, memory=512e9, power=350),
]

HARDWARE = {hardware.name: hardware for hardware in _NAMED}


def hardware_of(name: str) -> Hardware:
    """A named device, or the YAML file of one. Raises ValueError for an unknown name or key, or a missing number."""
    if Path(name).suffix in (".yaml", ".yml"):
        return _read(Path(name))
    if name not in HARDWARE:
        raise ValueError(f"unknown GPU {name!r}; use one of {', '.join(HARDWARE)}, or a YAML file of your own")
    return HARDWARE[name]


def _read(file: Path) -> Hardware:
    """Keys as the fields of Hardware; `name` may be left out."""
    raw: Any = yaml_file.read(file)
    known = [f.name for f in fields(Hardware)]
    numbers = [name for name in known if name not in ("name", "device")]
    if not isinstance(raw, dict) or set(numbers) - set(raw):
        raise ValueError(
            f"{file} must hold {', '.join(numbers)}: FLOP/s in 16 bits, bytes per second, bytes, and watts"
        )
    unknown = sorted(str(key) for key in raw if key not in known)
    if unknown:
        raise ValueError(f"{file} has unknown keys: {', '.join(unknown)}; the keys are {', '.join(known)}")
    values: dict[str, Any] = {"name": file.stem} | {key: _number(file, key, raw[key]) for key in numbers}
    values |= {key: str(raw[key]) for key in ("name", "device") if raw.get(key) is not None}
    return Hardware(**values)


def _number(file: Path, key: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e12 as a text
    except (TypeError, ValueError):
        raise ValueError(f"{key} in {file} is {value!r}; write a number") from None
