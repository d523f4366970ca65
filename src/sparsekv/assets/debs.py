"""Files out of one Debian package: `apt-get download` fetches it, its SHA-256 is checked, nothing is installed or run.

A package is an `ar` archive whose member data.tar.* holds the files.
"""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsekv.assets.fetched import fetch_once

_MAGIC, _HEADER = b"!<arch>\n", 60


def fetch_deb(package: str, version: str, into: Path, *, sha256: str) -> Path:
    """The package's file in folder `into`, downloaded there unless it is there already.

    Raises:
        ValueError: apt-get is missing or does not have it (the sentence says which file to place where), or the file,
            downloaded or placed by hand, is not the expected one.
    """
    target = into / f"{package}_{version}_all.deb"

    def fetch(scratch: Path) -> Path:
        _download(f"{package}={version}", scratch)
        found = scratch / target.name
        if not found.exists():
            raise ValueError(
                f"Could not download {target.name} with apt-get: get that file from a Debian mirror "
                f"(pool/main/{package[0]}/{package}/) and place it at {target}"
            )
        return found

    return fetch_once(target, sha256=sha256, origin="Debian", fetch=fetch)


def members(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the wanted files of a package, such as ./usr/share/doc/x/index.html."""
    with deb.open("rb") as archive:
        assert archive.read(len(_MAGIC)) == _MAGIC, f"{deb} is no ar archive"
        while header := archive.read(_HEADER):
            name, size = header[:16].decode().strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                break
            archive.seek(size + size % 2, 1)
        with tarfile.open(fileobj=archive, mode="r|*") as tar:
            for entry in tar:
                content = tar.extractfile(entry) if wanted(entry.name) else None
                if content is not None:
                    yield entry.name, content.read()


def _download(pin: str, folder: Path) -> None:
    """The package in `folder` if apt-get has it, with a package list of its own where the machine's is missing or old.
    apt-get's output goes to stderr: stdout may be a command's JSON."""
    print(f"Fetching {pin} (once)", file=sys.stderr)
    if not shutil.which("apt-get"):
        return

    def apt_get(*arguments: str) -> bool:
        return subprocess.run(["apt-get", *arguments], cwd=folder, stdout=2, check=False).returncode == 0

    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    own = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={folder}", "-oDebug::NoLocking=1", "-qq"]
    if not apt_get("download", pin) and apt_get(*own, "update"):
        apt_get(*own, "download", pin)
