"""Files by which the processes of one run share its work."""

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


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether the file is this process's, within; False, without waiting, where another process has claimed it."""
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
