# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that have no name until they are complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.engine.errors import OutputError, OutputExistsError
from mktme.engine.new_file import NewFile, publish

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

KILLED = """\
import os, signal, sys
from pathlib import Path
from mktme.engine.new_file import NewFile
new = NewFile(Path(sys.argv[1]), 4096)
new.write(0, b"x" * 4096)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["O_TMPFILE", "named"])
def anyhow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a file system that has unnamed files, and on one that has none."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)  # EISDIR
    return str(request.param)


def test_file_has_its_name_when_it_is_published(anyhow: str, tmp_path: Path) -> None:
    path = tmp_path / "new"
    with NewFile(path, 3 * 4096) as new:
        new.write(4096, b"contents")
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == (anyhow == "named")
        new.publish()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == bytes(4096) + b"contents" + bytes(2 * 4096 - 8)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 == 4096


def test_file_that_is_not_published_is_gone(anyhow: str, tmp_path: Path) -> None:
    with NewFile(tmp_path / "new", 4096) as new:
        new.write(0, b"x")
    assert list(tmp_path.iterdir()) == []
    new.close()


def test_kill_leaves_nothing(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "new"], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_exists_is_left_as_it_is(anyhow: str, when: str, tmp_path: Path) -> None:
    path = tmp_path / "new"
    if when == "before":
        path.symlink_to("dangling")
        with pytest.raises(OutputExistsError, match="new: exists"):
            NewFile(path)
        assert path.is_symlink()
        return
    with NewFile(path) as new:
        path.write_text("theirs")
        with pytest.raises(OutputExistsError, match="new: exists"):
            new.publish()
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_all_or_none(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with NewFile(first) as one, NewFile(second) as two:
        second.write_text("theirs")
        with pytest.raises(OutputExistsError):
            publish([one, two])
    assert [path.name for path in tmp_path.iterdir()] == ["second"]
    with NewFile(first) as one, NewFile(tmp_path / "third") as two:
        publish([one, two])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "new", Path("/proc/new"), tmp_path / "nul\0" / "new"):
        with pytest.raises(OutputError, match="no file can be made there"):
            NewFile(path)


@pytest.mark.parametrize("name", ["n" * 256, "nul\0"])
def test_names_that_no_file_can_have(anyhow: str, name: str, tmp_path: Path) -> None:
    """Known before anything is done for it."""
    with pytest.raises(OutputError, match="no file can be made there"):
        NewFile(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gone", [True, False])
def test_hidden_name_that_cannot_be_removed(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors are closed all the same."""
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)
    new = NewFile(tmp_path / "new")
    (hidden,) = tmp_path.iterdir()
    hidden.unlink()
    if gone:
        new.close()
    else:
        hidden.mkdir()
        with pytest.raises(IsADirectoryError):
            new.close()
    new.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for little."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_file_system_that_is_full(full: Path) -> None:
    with NewFile(full / "new", 1 << 20) as new:
        with pytest.raises(OutputError, match="No space left on device; nothing of it") as caught:
            new.write(0, bytes(1 << 20))
        assert "make space" in (caught.value.hint or "")
    assert list(full.iterdir()) == []
    assert os.statvfs(full).f_bfree * 4096 == 64 << 10
