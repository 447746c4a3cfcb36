# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of DRAM as it is at one moment, while it goes on being written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import OutputError, OutputExistsError
from mktme.engine.new_file import publish
from mktme.engine.snapshot import COPY_PAGES, ContentsDigest, CopyMethod, Snapshot

PAGE = 4096
PAGES = 4 * COPY_PAGES
SIZE = PAGES * PAGE
ALL = (Region(0, SIZE),)
RANDOM = Random(6)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def dram(tmp_path: Path) -> Iterator[Dram]:
    with Dram.create(tmp_path / "dram", SIZE) as dram:
        yield dram


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def page(dram: Dram, number: int) -> bytes:
    data = bytearray(PAGE)
    dram.read_into(number * PAGE, data)
    return bytes(data)


def taken(snapshot: Snapshot) -> bytes:
    """What the copy holds, complete."""
    for _ in snapshot.copy():
        pass
    return os.pread(snapshot.image.fd, SIZE, 0)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_copy_is_of_one_moment(dram: Dram, path: Path) -> None:
    written = {number: RANDOM.randbytes(PAGE) for number in (0, 1, 7, PAGES // 2, PAGES - 1)}
    for number, data in written.items():
        dram.write(number * PAGE, data)
    with Snapshot(dram, path, ALL) as snapshot:
        snapshot.prepare()
        snapshot.begin()
        assert snapshot.data_bytes == len(written) * PAGE
        dram.write(7 * PAGE + 64, b"n" * 64)  # a part of one
        dram.write(9 * PAGE, b"n" * PAGE)  # of a page that was a hole
        dram.write(0, b"n" * PAGE)
        dram.erase(Region(SIZE // 2, SIZE // 2))
        expected = bytearray(SIZE)
        for number, data in written.items():
            expected[number * PAGE : (number + 1) * PAGE] = data
        assert taken(snapshot) == expected
        if snapshot.method is CopyMethod.COPY_ON_WRITE:
            assert snapshot.saved_bytes == 4 * PAGE
        assert blocks(snapshot.image.fd) == len(written) * PAGE
        assert dram.before_write is None
        publish([snapshot.image])
    assert path.read_bytes() == expected
    assert page(dram, 9) == b"n" * PAGE


@given(st.data())
def test_whatever_is_written_meanwhile(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Writes, MACs, erasures and batches of the copy in any order."""
    directory = tmp_path_factory.mktemp("any")
    draw = data.draw
    pages = st.integers(0, PAGES - 1)
    rng = Random(draw(st.integers()))
    with Dram.create(directory / "dram", SIZE) as dram:
        for number in draw(st.lists(pages, max_size=40)):
            dram.write(number * PAGE, rng.randbytes(PAGE))
            dram.write_macs(number * PAGE, rng.randbytes(PAGE // 16))
        before = (dram.path.read_bytes(), mac_path(dram.path).read_bytes())
        with Snapshot(dram, directory / "copy", ALL) as snapshot:
            snapshot.begin()
            batches = snapshot.copy()
            for what in draw(st.lists(st.sampled_from(["write", "macs", "erase", "copy"]))):
                first = draw(pages)
                count = draw(st.integers(1, PAGES - first))
                match what:
                    case "write":
                        dram.write(first * PAGE, rng.randbytes(count * PAGE))
                    case "macs":
                        dram.write_macs(first * PAGE, rng.randbytes(count * PAGE // 16))
                    case "erase":
                        dram.erase(Region(first * PAGE, count * PAGE))
                    case "copy":
                        next(batches, None)
            assert taken(snapshot) == before[0]
            assert os.pread(snapshot.macs.fd, SIZE, 0) == before[1]
    shutil.rmtree(directory)


def test_much_that_is_about_to_be_erased_is_saved_bit_by_bit(dram: Dram, path: Path) -> None:
    data = RANDOM.randbytes(SIZE)
    dram.write(0, data)
    with Snapshot(dram, path, ALL) as snapshot:
        assert list(snapshot.save(ALL[0])) == []  # nothing is of a moment yet
        snapshot.begin()
        batches = snapshot.save(Region(PAGE, SIZE - PAGE))
        assert next(batches) == COPY_PAGES
        dram.write(SIZE - PAGE, b"n" * PAGE)  # others come in between
        assert sum(batches) == PAGES - COPY_PAGES - 2
        saved = snapshot.saved_bytes
        assert saved == SIZE - PAGE
        dram.erase(Region(PAGE, SIZE - PAGE))
        assert snapshot.saved_bytes == saved
        assert taken(snapshot) == data
        assert list(snapshot.save(ALL[0])) == []


def test_what_one_saves_when_it_is_over_is_not_the_next_ones(dram: Dram, path: Path) -> None:
    dram.write(0, b"x" * SIZE)
    with Snapshot(dram, path, ALL) as first:
        first.begin()
        batches = first.save(ALL[0])
        next(batches)
    with Snapshot(dram, path, ALL) as second:
        second.begin()
        assert list(batches) == []
        first.close()
        dram.write(0, b"n" * SIZE)
        assert taken(second) == b"x" * SIZE


def test_only_what_was_asked_for(dram: Dram, path: Path) -> None:
    dram.write(0, b"x" * SIZE)
    regions = (Region(2 * PAGE, PAGE), Region(SIZE // 2, PAGE))
    with Snapshot(dram, path, regions) as snapshot:
        snapshot.begin()
        dram.write(0, b"n" * SIZE)
        copy = taken(snapshot)
        assert snapshot.saved_bytes == snapshot.data_bytes == 2 * PAGE
    for region in regions:
        assert copy[region.base : region.end] == b"x" * PAGE
    assert copy.count(0) == SIZE - 2 * PAGE


def test_macs_alone_are_copied(dram: Dram, path: Path) -> None:
    """Of a line whose ciphertext an attacker made zeros, the MAC is still there."""
    entries = RANDOM.randbytes(PAGE // 16)
    dram.write_macs(3 * PAGE, entries)
    with Snapshot(dram, path, ALL) as snapshot:
        snapshot.begin()
        assert not any(taken(snapshot))
        assert blocks(snapshot.image.fd) == 0
        macs = os.pread(snapshot.macs.fd, SIZE // 16, 0)
    assert macs[3 * PAGE // 16 :][: len(entries)] == entries
    assert macs.count(0) >= len(macs) - len(entries)


def test_module_that_comes_and_goes(dram: Dram, path: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        modules = [
            stack.enter_context(Dram.create(tmp_path / name, 2 * PAGE)) for name in ("one", "two")
        ]
        dram.write(PAGE, b"d" * PAGE)
        dram.attach(4 * PAGE, modules[0])
        dram.write(4 * PAGE, b"m" * PAGE)
        snapshot = stack.enter_context(Snapshot(dram, path, ALL))
        snapshot.begin()
        dram.detach(modules[0])
        modules[0].close()
        dram.attach(0, modules[1])
        dram.write(PAGE, b"n" * PAGE)
        copy = taken(snapshot)
    assert copy[PAGE : 2 * PAGE] == b"d" * PAGE
    assert copy[4 * PAGE : 5 * PAGE] == b"m" * PAGE
    assert copy.count(0) == SIZE - 2 * PAGE


def test_copy_that_fails_is_not_the_writers_business(dram: Dram, path: Path) -> None:
    dram.write(0, b"x" * PAGE)
    with Snapshot(dram, path, ALL) as snapshot:
        snapshot.begin()
        os.close(snapshot.image.fd)
        snapshot.image.fd = os.open("/dev/full", os.O_RDWR)
        dram.write(0, b"n" * PAGE)
        assert dram.before_write is None
        with pytest.raises(OutputError, match="No space left"):
            taken(snapshot)
    assert page(dram, 0) == b"n" * PAGE
    assert not path.exists()


def test_names_that_are_taken(dram: Dram, path: Path) -> None:
    for taken_name in (path, mac_path(path)):
        taken_name.touch()
        with pytest.raises(OutputExistsError):
            Snapshot(dram, path, ALL)
        taken_name.unlink()
    Snapshot(dram, path, ALL).close()
    Snapshot(dram, path, ALL).close()


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share blocks; CI has no excuse not to have btrfs-progs."""
    if not shutil.which("mkfs.btrfs") and not os.environ.get("CI"):
        pytest.skip("there is no mkfs.btrfs")
    disk, place = tmp_path / "disk", tmp_path / "btrfs"
    with disk.open("wb") as file:
        file.truncate(256 << 20)
    place.mkdir()
    subprocess.run(["mkfs.btrfs", "--quiet", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def has_no_place_on_disk(file: Path) -> bool:
    """Whether some of a file is in the page cache only (FIEMAP_EXTENT_DELALLOC)."""
    told = subprocess.run(["filefrag", "-v", file], capture_output=True, text=True, check=True)
    assert "ext:" in told.stdout
    return "delalloc" in told.stdout


@needs_root
def test_reflink(sharing: Path) -> None:
    """The file system shares the blocks: the copy is there at once, and nothing is copied."""
    data, entries = RANDOM.randbytes(SIZE), RANDOM.randbytes(SIZE // 16)
    with Dram.create(sharing / "dram", SIZE) as dram:
        dram.write(0, data)
        dram.write_macs(0, entries)
        with Snapshot(dram, sharing / "copy", ALL) as snapshot:
            assert has_no_place_on_disk(dram.path)
            snapshot.prepare()
            assert snapshot.method is CopyMethod.REFLINK
            assert not has_no_place_on_disk(dram.path)
            assert blocks(snapshot.image.fd) == 0  # so long as nobody stands still
            dram.write(0, data[:PAGE])
            snapshot.begin()
            assert snapshot.method is CopyMethod.REFLINK
            assert dram.before_write is None
            dram.write(0, b"n" * SIZE)
            assert list(snapshot.copy()) == []
            assert os.pread(snapshot.image.fd, SIZE, 0) == data
            assert os.pread(snapshot.macs.fd, SIZE, 0) == entries
            assert snapshot.data_bytes == SIZE


def test_reflink_that_fails_at_the_moment_is_a_copy(
    dram: Dram, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the file system were full."""
    asked: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        asked.append(int.from_bytes(argument[16:24], "little"))
        if asked[-1]:
            os.pwrite(fd, b"half", 0)
            raise OSError(errno.ENOSPC, "full")
        return 0

    dram.write(PAGE, b"x" * PAGE)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with Snapshot(dram, path, ALL) as snapshot:
        snapshot.prepare()
        methods = [snapshot.method]
        snapshot.begin()
        assert [*methods, snapshot.method] == [CopyMethod.REFLINK, CopyMethod.COPY_ON_WRITE]
        assert taken(snapshot) == bytes(PAGE) + b"x" * PAGE + bytes(SIZE - 2 * PAGE)
    assert asked == [0, 0, SIZE]


def test_digest_is_what_its_rule_says() -> None:
    pages = [RANDOM.randbytes(PAGE), bytes(PAGE), b"\1" + bytes(PAGE - 1), b"tail"]
    expected = hashlib.sha256()
    for index in (0, 2, 3):
        expected.update((index * PAGE).to_bytes(8, "little") + pages[index])
    contents = np.frombuffer(b"".join(pages), np.uint8)
    for cut in (0, PAGE, 2 * PAGE, 3 * PAGE):
        digest = ContentsDigest()
        digest.update(0, contents[:cut])
        digest.update(cut, contents[cut:])
        assert digest.hexdigest() == expected.hexdigest()
