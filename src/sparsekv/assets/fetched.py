"""The user's cache folder: files that are fetched once and checked, and documents made from them, kept as JSON.

Everything reaches its place in one step, so that a folder never holds half a file. A file that the user has placed
there by hand is accepted on the same terms.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of sparsekv: `~/.cache/sparsekv`, moved by XDG_CACHE_HOME as any other cache is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekv"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_once(target: Path, *, sha256: str, origin: str, fetch: Callable[[Path], Path]) -> Path:
    """`target`, there already or what `fetch` leaves in the empty folder that it is given.

    Raises:
        ValueError: what `fetch` raises, or a file, fetched or placed by hand, that is not the one of `origin`.
    """
    if target.exists():
        if sha256_of(target) != sha256:
            raise ValueError(f"{target} is not the file of that name in {origin} (wrong SHA-256): delete it")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        found = fetch(Path(scratch))
        if sha256_of(found) != sha256:
            raise ValueError(f"{target.name} of the downloaded {origin} has the wrong SHA-256: nothing was kept")
        found.replace(target)
    return target


def documents_once(path: Path, make: Callable[[], list[str]]) -> list[str]:
    """Documents kept at `path`, made if they are not there."""
    if not path.exists():
        documents = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))
