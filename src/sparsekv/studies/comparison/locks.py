"""A file that the processes of one run hold, together or one at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(lock: Path, *, alone: bool = True) -> Iterator[None]:
    """Within, no other process holds it alone, nor, if this one does, at all."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
