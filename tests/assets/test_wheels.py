"""Fetching one file out of one wheel, with pip itself against a folder of wheels instead of the network."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from sparsekv.assets.fetched import cache_folder
from sparsekv.assets.wheels import fetch_wheel_member

PIN, MEMBER, CONTENT = "tinything==1.0", "tinything/data/words.bin", b"a few bytes" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only source of wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index):
    path = index / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tinything-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        archive.writestr(
            "tinything-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinything-1.0.dist-info/RECORD", "")
    return path


def _fetch(into: Path, *, sha256: str = SHA256) -> Path:
    return fetch_wheel_member(PIN, MEMBER, sha256=sha256, into=into)


def test_the_member_arrives_alone_and_is_fetched_once(wheel, tmp_path):
    into = tmp_path / "deep" / "cache"
    assert _fetch(into).read_bytes() == CONTENT
    assert [path.name for path in into.iterdir()] == ["words.bin"]
    wheel.unlink()
    assert _fetch(into) == into / "words.bin"


def test_stdout_stays_clean(wheel, tmp_path, capfd):
    _fetch(tmp_path / "cache")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching tinything==1.0" in err


def test_a_wheel_of_another_platform_is_taken_too(wheel, index, tmp_path):
    wheel.rename(index / "tinything-1.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl")
    assert _fetch(tmp_path / "cache").read_bytes() == CONTENT


def test_a_wrong_digest_keeps_nothing(wheel, tmp_path):
    with pytest.raises(ValueError, match="wrong SHA-256: nothing was kept"):
        _fetch(tmp_path / "cache", sha256="0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_network_one_sentence_says_what_to_place_where(index, tmp_path):
    with pytest.raises(ValueError, match="Could not download") as error:
        _fetch(tmp_path / "cache")
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in (PIN, MEMBER, str(tmp_path / "cache" / "words.bin")):
        assert part in sentence
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_placed_by_hand_is_accepted_if_it_is_the_right_one(index, tmp_path):
    (tmp_path / "words.bin").write_bytes(CONTENT)
    assert _fetch(tmp_path) == tmp_path / "words.bin"
    (tmp_path / "words.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it"):
        _fetch(tmp_path)
    assert (tmp_path / "words.bin").read_bytes() == b"something else"


def test_the_cache_folder_moves_with_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sparsekv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sparsekv"
