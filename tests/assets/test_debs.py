"""A file out of a Debian package, with a stand-in for apt-get instead of the network."""

import hashlib
import io
import stat
import tarfile
from pathlib import Path

import pytest

from sparsekv.assets.debs import fetch_deb, members


def _ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def _deb(files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": raw.getvalue()}
    return b"!<arch>\n" + b"".join(_ar_member(name, content) for name, content in parts.items())


PACKAGE = _deb({"./a/one.html": b"first", "./a/two.css": b"second", "./b/three.html": b"third"})
SHA256 = hashlib.sha256(PACKAGE).hexdigest()


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """An apt-get that hands out PACKAGE, whatever is asked."""
    served, folder = tmp_path / "served", tmp_path / "bin"
    served.write_bytes(PACKAGE)
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(f"#!/bin/sh\necho $@\nexec /bin/cp {served} thing_1.0_all.deb\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder))


def _fetch(into: Path, *, sha256: str = SHA256) -> Path:
    return fetch_deb("thing", "1.0", into, sha256=sha256)


def test_a_package_is_fetched_once_and_read(apt, monkeypatch, tmp_path, capfd):
    into = tmp_path / "cache"
    deb = _fetch(into)
    assert deb == into / "thing_1.0_all.deb"
    out, err = capfd.readouterr()
    assert out == ""
    assert "download thing=1.0" in err
    monkeypatch.setenv("PATH", "")
    assert _fetch(into) == deb
    assert dict(members(deb, lambda name: name.endswith(".html"))) == {
        "./a/one.html": b"first",
        "./b/three.html": b"third",
    }


def test_without_apt_one_sentence_says_what_to_place_where(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"Could not download thing_1\.0_all\.deb") as error:
        _fetch(tmp_path / "cache")
    assert str(tmp_path / "cache" / "thing_1.0_all.deb") in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_digest_keeps_nothing(apt, tmp_path):
    with pytest.raises(ValueError, match="wrong SHA-256: nothing was kept"):
        _fetch(tmp_path / "cache", sha256="0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_placed_by_hand_is_accepted_if_it_is_the_right_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "thing_1.0_all.deb").write_bytes(PACKAGE)
    assert _fetch(tmp_path).read_bytes() == PACKAGE
    (tmp_path / "thing_1.0_all.deb").write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it"):
        _fetch(tmp_path)
