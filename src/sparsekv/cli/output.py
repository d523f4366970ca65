"""Files that a command leaves: refused before its work where they cannot be, and whole or not there after it."""

from pathlib import Path


def check_target(file: Path) -> None:
    """Raises ValueError where `file` could not be written."""
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} for {file.name}: make it, or name another file")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file in it")


def write_text(file: Path, text: str) -> None:
    """Write a file, through a temporary sibling. Raises ValueError where the system refuses, such as a full disk."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {file}: {error.strerror}; make room there, or name another file") from None
