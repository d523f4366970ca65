"""Where numbers come from: the commit of the checkout that runs."""

import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """Of this checkout, "-dirty" where it holds changes; None where the package is installed and no checkout, so that
    the repository around an environment is not taken for it."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
