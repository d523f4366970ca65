"""Where numbers come from: the commit of the checkout that runs, the hardware, the versions."""

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsekv import __version__

_ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """Of this checkout, "-dirty" where it holds changes; None where the package is installed and no checkout, so that
    the repository around an environment is not taken for it."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """What a result must carry: commit, hardware, versions."""
    return {
        "commit": commit(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "sparsekv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
