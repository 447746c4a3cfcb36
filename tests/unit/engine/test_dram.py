# SPDX-License-Identifier: GPL-2.0-or-later
"""The DRAM image and its sidecar."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest

from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import AddressError, DramError, DramFullError
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.sidecar import (
    GuestSegment,
    IntegrityRecord,
    PageRange,
    PlatformRecord,
    Sidecar,
    VmRecord,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.xts import Algorithm

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "dram"


@pytest.fixture
def dram(image: Path) -> Iterator[Dram]:
    with Dram.create(image, 8 * MIB) as dram:
        yield dram


def read(dram: Dram, address: int, size_bytes: int) -> bytes:
    buffer = bytearray(size_bytes)
    dram.read_into(address, buffer)
    return bytes(buffer)


# --- the file ---------------------------------------------------------------------------------


def test_new_image_is_sparse_private_and_reads_as_zeros(dram: Dram, image: Path) -> None:
    status = image.stat()
    assert status.st_size == dram.size_bytes == 8 * MIB
    assert status.st_blocks == 0
    assert status.st_mode & 0o777 == 0o600
    assert read(dram, 8 * MIB - 100, 100) == bytes(100)


def test_data_is_at_its_address_in_the_file(dram: Dram, image: Path) -> None:
    dram.write(5 * MIB + 3, b"ciphertext")
    assert read(dram, 5 * MIB + 3, 10) == b"ciphertext"
    assert image.read_bytes()[5 * MIB + 3 :].startswith(b"ciphertext\0")


def test_buffers_of_any_item_type_are_taken(dram: Dram) -> None:
    words = np.arange(1024, dtype=np.uint64).reshape(2, 512)
    dram.write(4096, words.data)
    back = np.zeros_like(words)
    dram.read_into(4096, back.data)
    assert np.array_equal(back, words)


def test_short_reads_and_writes_are_continued(dram: Dram, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:1000]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    data = os.urandom(4096)
    dram.write(64, data)
    assert read(dram, 64, 4096) == data


@pytest.mark.parametrize(
    ("address", "size_bytes"), [(-64, 64), (8 * MIB, 1), (8 * MIB - 64, 65), (0, 8 * MIB + 1)]
)
def test_range_outside_is_refused(dram: Dram, address: int, size_bytes: int) -> None:
    with pytest.raises(AddressError) as caught:
        dram.read_into(address, bytearray(size_bytes))
    assert caught.value.address == address
    with pytest.raises(AddressError):
        dram.write(address, bytes(size_bytes))


def test_file_cut_short_is_an_error(dram: Dram, image: Path) -> None:
    os.truncate(image, 4096)
    with pytest.raises(DramError, match="cut short at 0x1000"):
        read(dram, 4000, 200)


@pytest.mark.parametrize("address", [0, 4096, 512 * 1024])
def test_file_cut_short_is_not_made_longer_again(dram: Dram, image: Path, address: int) -> None:
    """What was cut off would be a hole before the next write: zeros in place of data."""
    dram.write(8192, b"data" * 16)
    os.truncate(image, 4096)
    with pytest.raises(DramError, match="cut short at 0x1000"):
        dram.write(address, bytes(64))
    assert image.stat().st_size == 4096


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_file_system_names_the_first_byte_not_written(
    dram: Dram, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pwrite = os.pwrite

    def full_after_a_page(fd: int, data: memoryview, address: int) -> int:
        if address > 0:
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data[:4096], address)

    monkeypatch.setattr(os, "pwrite", full_after_a_page)
    with pytest.raises(DramFullError, match=os.strerror(number)) as caught:
        dram.write(0, bytes(8192))
    assert caught.value.address == 4096
    assert "make space" in str(caught.value.hint)


def test_other_errors_are_not_full(dram: Dram) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(DramError, match="File too large") as caught:
            dram.write(MIB, bytes(64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not isinstance(caught.value, DramFullError)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_really_full_file_system(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        with Dram.create(tmp_path / "dram", MIB) as dram:
            data = os.urandom(128 << 10)
            with pytest.raises(DramFullError) as caught:
                dram.write(4096, data)
            fitted = caught.value.address - 4096
            assert 0 < fitted <= 64 << 10
            assert read(dram, 4096, fitted) == data[:fitted]
            assert read(dram, 4096 + fitted, 64) == bytes(64)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# --- the MAC area -----------------------------------------------------------------------------


def test_mac_area_is_sparse_private_and_beside_the_image(dram: Dram, image: Path) -> None:
    area = mac_path(image)
    assert area == image.with_name("dram.mac")
    status = area.stat()
    assert status.st_size == 8 * MIB // 16
    assert status.st_blocks == 0
    assert status.st_mode & 0o777 == 0o600
    before = dram.has_macs
    dram.write_macs(5 * MIB + 64, b"two MACs")
    assert (before, dram.has_macs) == (False, True)
    assert area.read_bytes()[5 * MIB // 16 + 4 :].startswith(b"two MACs\0")
    entries = np.zeros(4, np.uint32)
    dram.read_macs_into(5 * MIB, entries.data)
    assert entries.tobytes() == bytes(4) + b"two MACs" + bytes(4)
    assert read(dram, 0, 8 * MIB) == bytes(8 * MIB)


@pytest.mark.parametrize(
    ("address", "size_bytes"), [(-64, 4), (8 * MIB, 4), (8 * MIB - 64, 8), (0, MIB // 2 + 4)]
)
def test_macs_of_a_range_outside_are_refused(dram: Dram, address: int, size_bytes: int) -> None:
    with pytest.raises(AddressError):
        dram.read_macs_into(address, bytearray(size_bytes))
    with pytest.raises(AddressError):
        dram.write_macs(address, bytes(size_bytes))
    assert not dram.has_macs


def test_full_mac_area_names_the_line(dram: Dram, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def full_after_an_entry(fd: int, data: memoryview, offset: int) -> int:
        if offset != 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[:4], offset)

    monkeypatch.setattr(os, "pwrite", full_after_an_entry)
    with pytest.raises(DramFullError, match=r"dram\.mac: cannot write at 0x8: ") as caught:
        dram.write_macs(64, bytes(12))
    assert caught.value.address == 128


def test_mac_area_cut_short_is_an_error(dram: Dram, image: Path) -> None:
    os.truncate(mac_path(image), 4096)
    with pytest.raises(DramError, match=r"dram\.mac: cut short at 0x1000"):
        dram.read_macs_into(4096 * 16, bytearray(4))
    with pytest.raises(DramError, match=r"dram\.mac: cut short at 0x1000"):
        dram.write_macs(4096 * 32, bytes(4))


def test_existing_mac_area_is_kept_unless_asked(image: Path) -> None:
    mac_path(image).write_bytes(b"precious")
    with pytest.raises(DramError, match=r"dram\.mac: exists") as caught:
        Dram.create(image, MIB)
    assert "remove it" in str(caught.value.hint)
    assert mac_path(image).read_bytes() == b"precious"
    assert not image.exists()
    with Dram.create(image, MIB, overwrite=True) as dram:
        entries = bytearray(8)
        dram.read_macs_into(0, entries)
        assert entries == bytes(8)


def test_image_needs_its_macs(dram: Dram, image: Path) -> None:
    dram.close()
    with Dram.open(image, read_only=False) as writer:
        writer.write_macs(0, b"MACs")
    with Dram.open(image) as reader:
        assert reader.has_macs
        with pytest.raises(DramError, match="cannot write"):
            reader.write_macs(0, b"MACs")
    os.truncate(mac_path(image), 64)
    with pytest.raises(DramError, match="64 bytes are not the MACs of 8388608 bytes of DRAM"):
        Dram.open(image)
    mac_path(image).unlink()
    with pytest.raises(DramError, match=r"dram\.mac: No such file"):
        Dram.open(image)
    mac_path(image).symlink_to(image)
    with pytest.raises(DramError, match="symbolic link"):
        Dram.open(image, read_only=False)


def test_erased_region_has_no_macs(dram: Dram, image: Path) -> None:
    region = dram.allocate(MIB)
    dram.write_macs(0, b"MACs" * (MIB // 64 + 1))
    dram.free(region)
    assert dram.allocate(MIB) == region
    found = mac_path(image).read_bytes()
    assert found[: MIB // 16] == bytes(MIB // 16)
    assert found[MIB // 16 :].startswith(b"MACs\0")
    assert len(found) == 8 * MIB // 16


# --- create and open --------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, -4096, 4095, 64])
def test_size_is_whole_pages(image: Path, size_bytes: int) -> None:
    with pytest.raises(ValueError, match="whole 4 KiB pages"):
        Dram.create(image, size_bytes)
    assert not image.exists()


def test_existing_file_is_kept_unless_asked(image: Path) -> None:
    image.write_bytes(b"precious")
    image.chmod(0o644)
    with pytest.raises(DramError, match="exists") as caught:
        Dram.create(image, MIB)
    assert "another path" in str(caught.value.hint)
    assert image.read_bytes() == b"precious"
    with Dram.create(image, MIB, overwrite=True) as dram:
        assert read(dram, 0, 8) == bytes(8)
    assert image.stat().st_mode & 0o777 == 0o600


def test_one_writer_at_a_time(dram: Dram, image: Path) -> None:
    dram.write(0, b"mine")
    with pytest.raises(DramError, match="another process"):
        Dram.create(image, MIB, overwrite=True)
    with pytest.raises(DramError, match="another process"):
        Dram.open(image, read_only=False)
    with Dram.open(image) as reader:
        assert read(reader, 0, 4) == b"mine"
    dram.close()
    with Dram.open(image, read_only=False) as writer:
        writer.write(0, b"ours")


def test_read_only_image_is_not_written(dram: Dram, image: Path) -> None:
    with Dram.open(image) as reader:
        assert reader.size_bytes == 8 * MIB
        with pytest.raises(DramError, match="cannot write at 0x40"):
            reader.write(64, b"x")


def test_what_is_no_image_is_refused(tmp_path: Path, image: Path) -> None:
    with pytest.raises(DramError, match="No such file"):
        Dram.open(image)
    with pytest.raises(DramError, match="not a regular file"):
        Dram.open(tmp_path)
    image.write_bytes(bytes(100))
    with pytest.raises(DramError, match="100 bytes are not whole pages"):
        Dram.open(image)
    (tmp_path / "link").symlink_to(image)
    with pytest.raises(DramError, match="symbolic link"):
        Dram.open(tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DramError, match="not a regular file"):
        Dram.open(tmp_path / "fifo")
    with pytest.raises(DramError, match="No such file"):
        Dram.create(tmp_path / "none" / "dram", MIB)


def test_image_too_large_for_its_file_system_is_refused(image: Path) -> None:
    with pytest.raises(DramError, match="no DRAM of"):
        Dram.create(image, 1 << 62)
    assert not image.exists()


def test_closing_twice_is_fine(dram: Dram) -> None:
    dram.close()
    dram.close()
    with pytest.raises(DramError, match="Bad file descriptor"):
        read(dram, 0, 1)


# --- regions ----------------------------------------------------------------------------------


def test_first_fit_on_2_mib_boundaries(dram: Dram) -> None:
    first = dram.allocate(4096)
    second = dram.allocate(2 * MIB)
    third = dram.allocate(2 * MIB)
    assert [first, second, third] == [
        Region(0, 4096),
        Region(2 * MIB, 2 * MIB),
        Region(4 * MIB, 2 * MIB),
    ]
    dram.free(second)
    assert dram.allocate(MIB) == Region(2 * MIB, MIB)
    assert dram.allocate(2 * MIB) == Region(6 * MIB, 2 * MIB)


def test_exhausted_dram_is_an_address_error(dram: Dram) -> None:
    dram.allocate(6 * MIB)
    with pytest.raises(AddressError, match="no free 2101248 bytes") as caught:
        dram.allocate(2 * MIB + 4096)
    assert "make DRAM larger" in str(caught.value.hint)
    assert dram.allocate(2 * MIB) == Region(6 * MIB, 2 * MIB)
    with pytest.raises(AddressError):
        dram.allocate(4096)


@pytest.mark.parametrize("size_bytes", [0, -4096, 100])
def test_region_is_whole_pages(dram: Dram, size_bytes: int) -> None:
    with pytest.raises(ValueError, match="whole 4 KiB pages"):
        dram.allocate(size_bytes)


def test_only_allocated_regions_can_be_freed(dram: Dram) -> None:
    region = dram.allocate(MIB)
    with pytest.raises(AddressError):
        dram.free(replace(region, size_bytes=4096))
    dram.free(region)
    with pytest.raises(AddressError):
        dram.free(region)


def test_freed_region_keeps_its_data_until_it_is_allocated_again(dram: Dram, image: Path) -> None:
    dram.allocate(2 * MIB)
    region = dram.allocate(MIB)
    dram.write(0, b"first" * 1000)
    dram.write(region.base, b"second" * 1000)
    dram.free(region)
    assert read(dram, region.base, 6) == b"second"
    assert dram.allocate(MIB) == region
    assert read(dram, region.base, MIB) == bytes(MIB)
    assert read(dram, 0, 5000) == b"first" * 1000
    assert image.stat().st_size == 8 * MIB
    # What follows is not erased either.
    dram.write(region.end, b"third")
    dram.free(region)
    dram.allocate(MIB)
    assert read(dram, region.end, 5) == b"third"


# --- the sidecar ------------------------------------------------------------------------------

SIDECAR = Sidecar(
    platform=PlatformRecord(maxphyaddr=46, keyid_bits=6, dram_bytes=8 * MIB),
    keys=(
        KeyDescription(0, KeyMode.PLATFORM, Algorithm.AES_XTS_128),
        KeyDescription(1, KeyMode.DIRECT, Algorithm.AES_XTS_256),
        KeyDescription(2, KeyMode.NO_ENCRYPT, None),
    ),
    vms=(
        VmRecord(
            uuid=UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11"),
            name="guest",
            base=2 * MIB,
            size_bytes=2 * MIB,
            keyid=1,
            segments=(
                GuestSegment(guest_physical=0, ram_offset=0, size_bytes=MIB),
                GuestSegment(guest_physical=1 << 32, ram_offset=MIB, size_bytes=MIB),
            ),
        ),
    ),
    pages=(
        PageRange(base=0, size_bytes=2 * MIB, keyid=0),
        PageRange(base=2 * MIB, size_bytes=2 * MIB, keyid=1),
        PageRange(base=4 * MIB, size_bytes=4 * MIB, keyid=0),
    ),
)


def test_sidecar_is_read_as_it_was_written(image: Path) -> None:
    path = sidecar_path(image)
    assert path.name == "dram.json"
    write_sidecar(path, SIDECAR)
    assert read_sidecar(path) == SIDECAR
    assert path.stat().st_mode & 0o777 == 0o600


def test_sidecar_can_be_understood_by_others(image: Path) -> None:
    write_sidecar(sidecar_path(image), SIDECAR)
    plain = json.loads(sidecar_path(image).read_text())
    assert plain["schema"] == "mktme-dram"
    assert plain["version"] == 5
    assert plain["data_unit_bytes"] == 64
    assert "16-byte little-endian" in plain["tweak"]
    assert "never written" in plain["never_written"]
    assert plain["integrity"] is None
    assert plain["keys"][1] == {"keyid": 1, "mode": "direct", "algorithm": "aes-xts-256"}
    assert plain["vms"][0]["segments"][1] == {
        "guest_physical": 1 << 32,
        "ram_offset": MIB,
        "size_bytes": MIB,
    }


def test_sidecar_tells_how_macs_are_made(image: Path) -> None:
    told = msgspec.structs.replace(SIDECAR, integrity=IntegrityRecord(file="dram.mac"))
    write_sidecar(sidecar_path(image), told)
    assert read_sidecar(sidecar_path(image)) == told
    plain = json.loads(sidecar_path(image).read_text())["integrity"]
    assert (plain["file"], plain["entry_bytes"]) == ("dram.mac", 4)
    for part in ("SHA3-256", "136 bytes", "mktme line MAC", "8-byte little-endian", "28 bits"):
        assert part in plain["rule"]


def test_new_sidecar_replaces_the_old_one_in_one_step(image: Path) -> None:
    path = sidecar_path(image)
    write_sidecar(path, SIDECAR)
    with path.open() as reader:
        write_sidecar(path, msgspec.structs.replace(SIDECAR, vms=()))
        assert '"guest"' in reader.read()  # the old file, whole
    assert read_sidecar(path).vms == ()
    assert os.listdir(path.parent) == [path.name]


def test_sidecar_that_cannot_be_put_in_place_leaves_nothing_behind(image: Path) -> None:
    path = sidecar_path(image)
    path.mkdir()
    with pytest.raises(DramError, match="cannot write the sidecar"):
        write_sidecar(path, SIDECAR)
    assert os.listdir(image.parent) == [path.name]
    with pytest.raises(DramError, match="cannot write the sidecar: No such file"):
        write_sidecar(image.parent / "none" / "dram.json", SIDECAR)


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(msgspec.json.encode(SIDECAR)) | fields).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid sidecar"),
        (b"{", "no valid sidecar"),
        (b"\xff\xfe", "no valid sidecar"),
        (b'{"schema": "\xff"}', "no valid sidecar"),
        (b'{"x": ' + b"[" * 5000, "no valid sidecar"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `schema`"),
        (changed(schema="other"), "its schema is 'other'"),
        (changed(version=3), "sidecar version 3, this mktme reads 5"),
        (changed(version=1), "sidecar version 1, this mktme reads 5"),
        (changed(extra=1), "unknown field `extra`"),
        (changed(data_unit_bytes=512), r"\$.data_unit_bytes"),
        (changed(integrity={}), r"\$.integrity"),
        (changed(integrity={"file": "x", "entry_bytes": 8}), r"\$.integrity.entry_bytes"),
        (changed(keys=[{"keyid": 0, "mode": "odd", "algorithm": None}]), r"\$.keys\[0\].mode"),
        (changed(pages=[{"base": -1, "size_bytes": 0, "keyid": 0}]), r"\$.pages\[0\].base"),
        (changed(pages=[{"base": 0, "size_bytes": 0, "keyid": 1 << 15}]), r"\$.pages\[0\].keyid"),
    ],
)
def test_bad_sidecar_is_refused_precisely(image: Path, content: bytes, message: str) -> None:
    image.write_bytes(content)
    with pytest.raises(DramError, match=message) as caught:
        read_sidecar(image)
    assert str(image) in str(caught.value)


def test_missing_sidecar_is_refused(image: Path) -> None:
    with pytest.raises(DramError, match="No such file"):
        read_sidecar(image)
