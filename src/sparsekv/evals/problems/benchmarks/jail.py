"""What a sandboxed process runs: `python -I jail.py PROGRAM LIMITS`. It gives up what it does not need, then runs the
program as __main__. Uses the standard library alone.

No network (a network namespace of its own, where the kernel gives one), limits on CPU seconds, memory, file sizes and
processes. Root becomes a user whom nobody else is, for whom alone the limit on processes counts.
"""

import ctypes
import json
import os
import resource
import sys

NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
TASKS = 16
"""Threads and processes that a program may have."""
COMMON = (
    "array bisect collections copy datetime decimal fractions functools heapq io itertools json math operator random "
    "re string sys time typing"
)
"""Imported while files can still be read."""


def confine(limits: dict[str, int]) -> None:
    """limits: "cpu" in seconds, "memory" and "file" in bytes, "user", an id that root becomes."""
    is_root = os.getuid() == 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(NEW_NETWORK if is_root else NEW_NETWORK | NEW_USER)
    tasks = TASKS if is_root else TASKS + own_tasks()
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (most, most))
    if is_root:
        os.setgroups([])
        os.setgid(limits["user"])
        os.setuid(limits["user"])


def own_tasks() -> int:
    """Tasks of this user, which the limit counts with the program's."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:  # it has ended
            continue
    return count


if __name__ == "__main__":
    for module in COMMON.split():
        __import__(module)
    with open(sys.argv[1], encoding="utf-8") as file:
        program = file.read()
    confine(json.loads(sys.argv[2]))
    sys.argv = [sys.argv[1]]
    exec(compile(program, sys.argv[0], "exec"), {"__name__": "__main__"})
