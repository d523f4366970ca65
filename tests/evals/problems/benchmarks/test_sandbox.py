"""Programs that loop, fork, fill memory or print for ever are ended, and leave nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsekv.evals.problems.benchmarks.sandbox import Limits, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
SHORT = Limits(seconds=0.5, memory=1 << 29, output=1 << 16)


def test_a_program():
    outcome = run("import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))", "1 2\n3 ü")
    assert outcome.status == "failed"
    assert run("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2\n3").output == "6\n"
    assert run("print('ü')").output == "ü\n"
    assert run("import sys; sys.exit(3)").status == "failed"
    assert run("def f(:").status == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "import os\nwhile True: os.fork()",
        "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        os.setsid()\n        break\nwhile True: pass",
        "import threading, time\nthreads = [threading.Thread(target=time.sleep, args=(60,)) for _ in range(4000)]\n"
        "[t.start() for t in threads]",
    ],
)
def test_stopped(program: str):
    """In little time, with no process left."""
    started = time.monotonic()
    before = _running()
    assert run(program, limits=SHORT).status in ("timeout", "failed")
    assert time.monotonic() - started < 8
    deadline = time.monotonic() + 5
    while _running() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _running() <= before


def test_memory_and_output():
    assert run("x = bytearray(1 << 32)", limits=SHORT).status == "failed"
    outcome = run("while True: print('x' * 1000)", limits=SHORT)
    assert outcome.status == "failed"
    assert len(outcome.output) <= SHORT.output


UNSHARE = "import ctypes, os; raise SystemExit(ctypes.CDLL(None).unshare(0x50000000 if os.getuid() else 0x40000000))"


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", UNSHARE]).returncode != 0, reason="no network namespaces here"
)
def test_no_network():
    """Not even this machine's own."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\nprint('reached')"
        assert "reached" not in run(program, limits=SHORT).output


def test_files_of_others(tmp_path):
    """Root's program cannot write where root can."""
    if os.getuid() == 0:
        target = tmp_path / "file"
        assert run(f"open({str(target)!r}, 'w').write('x')", limits=SHORT).status == "failed"
        assert not target.exists()


def _running() -> int:
    """Programs in jail."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            count += entry.name.isdigit() and b"jail.py" in Path(f"/proc/{entry.name}/cmdline").read_bytes()
        except OSError:
            continue
    return count
