"""Cells of a study for tests of its runner; processes begun anew must be able to import them."""

import os
from pathlib import Path

from sparsekv.json_lines import Line


def made(value: int) -> list[Line]:
    return [{"value": value, "process": os.getpid()}]


def fails(flag: Path) -> list[Line]:
    """Until the flag is there."""
    if not flag.exists():
        raise RuntimeError("out of memory")
    return made(1)


def dies() -> list[Line]:
    os._exit(3)
