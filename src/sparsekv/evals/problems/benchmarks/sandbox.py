"""Runs a program that nobody has read, with limits on time, memory, output and processes (jail.py)."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

START = 2.0
"""Seconds that the interpreter itself may take on a busy machine."""
JAIL = Path(__file__).with_name("jail.py")
_USERS = range(20_000, 60_000)
"""Root's programs run as users of these ids, one each."""
_NUMBERS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run."""

    seconds: float = 6.0
    """By the clock; a second more of CPU."""
    memory: int = 1 << 30
    output: int = 1 << 24
    """Bytes of each file that it writes, its output among them."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run."""

    status: str
    """ "ok"; "failed", with an exit code that is not 0 or a limit hit; "timeout" """
    output: str
    """What it printed, undecodable bytes replaced."""


def run(program: str, text: str = "", *, limits: Limits | None = None) -> Outcome:
    """Run Python code with a text as its input; every process that it leaves is ended."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="sparsekv-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        (folder / "input").write_text(text, encoding="utf-8", errors="replace")
        (folder / "work").mkdir()
        (folder / "work").chmod(0o777)
        user = _USERS[(97 * os.getpid() + next(_NUMBERS)) % len(_USERS)]
        bounds = {
            "cpu": int(limits.seconds) + 1,
            "memory": limits.memory,
            "file": limits.output,
            "user": user,
        }
        command = [sys.executable, "-I", str(JAIL), str(folder / "program.py"), json.dumps(bounds)]
        with (folder / "input").open("rb") as stdin, (folder / "output").open("wb+") as stdout:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=folder / "work",
                env={"PATH": os.defpath, "HOME": str(folder / "work"), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                code = process.wait(limits.seconds + START)
                status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                _end(process, user)
            stdout.seek(0)
            return Outcome(status=status, output=stdout.read().decode("utf-8", errors="replace"))


def _end(process: subprocess.Popen[bytes], user: int) -> None:
    """End the program's session, and as root all that its user runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = True
    while found and os.getuid() == 0:
        found = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit() and _owner(entry) == user]
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _owner(entry: "os.DirEntry[str]") -> int | None:
    try:
        return entry.stat().st_uid
    except OSError:  # it has ended
        return None
