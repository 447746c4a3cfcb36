# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening DRAM images, and reading what is in them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mktme.dump.image import CHUNK_BYTES, DumpChangedError, DumpError, DumpImage
from mktme.engine.dram import Region, mac_path
from mktme.engine.errors import AddressError
from mktme.engine.sidecar import IntegrityRecord, ModuleRecord, PageRange, sidecar_path

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_BYTES, VM_KEYID, VM_UUID, MakeImage, describe

DATA = random.Random(1).randbytes(3 * PAGE)


def test_what_is_in_it(make_image: MakeImage) -> None:
    with DumpImage.open(make_image({VM_BASE: DATA})) as image:
        assert image.size_bytes == DRAM_BYTES
        assert image.data_ranges() == [Region(VM_BASE, len(DATA))]
        assert image.read(VM_BASE - 1, len(DATA) + 2).tobytes() == b"\0" + DATA + b"\0"
        assert image.vm("alice").base == image.vm(str(VM_UUID)).base == VM_BASE
        keyids = image.keyids()
        assert keyids.dtype == np.uint16
        assert keyids.shape == (DRAM_BYTES // PAGE,)
        assert np.flatnonzero(keyids == VM_KEYID).tolist() == list(
            range(VM_BASE // PAGE, (VM_BASE + VM_BYTES) // PAGE)
        )
        key = image.key(VM_KEYID)
        assert key is not None
        assert key.keyid == VM_KEYID
        unlisted = image.key(5)
        assert unlisted is not None
        assert unlisted.keyid == 0
        image.check_unchanged()


def test_pieces_are_what_was_written_and_no_more(make_image: MakeImage) -> None:
    written = {0: DATA[:PAGE], 10 * PAGE: DATA, 255 * PAGE: DATA[:PAGE]}
    with DumpImage.open(make_image(written)) as image:
        chunks = list(image.chunks(4 * PAGE))
        assert [(one.address // PAGE, len(one.data) // PAGE) for one in chunks] == [
            (0, 1),
            (10, 2),
            (12, 1),
            (255, 1),
        ]
        assert b"".join(one.data.tobytes() for one in chunks) == b"".join(written.values())
        overlapping = list(image.chunks(4 * PAGE, overlap_bytes=16))
        assert overlapping[1].data.tobytes() == DATA[: 2 * PAGE + 16]
        assert overlapping[2].data.tobytes() == DATA[2 * PAGE :] + bytes(16)
        assert len(overlapping[3].data) == PAGE  # nothing follows
        with pytest.raises(ValueError, match="whole 4 KiB pages"):
            list(image.chunks(100))


def test_image_is_as_large_as_it_says(make_image: MakeImage) -> None:
    path = make_image({0: DATA})
    os.truncate(path, DRAM_BYTES - PAGE)
    with pytest.raises(DumpError, match=f"truncated: {DRAM_BYTES - PAGE} bytes"):
        DumpImage.open(path)
    os.truncate(path, DRAM_BYTES + PAGE)
    with pytest.raises(DumpError, match="not its image"):
        DumpImage.open(path)


def test_sidecar_that_is_missing_or_of_another_version(make_image: MakeImage) -> None:
    path = make_image({0: DATA})
    described = sidecar_path(path)
    moved = described.rename(described.with_name("elsewhere.json"))
    with pytest.raises(DumpError, match="nothing says how dram is to be read") as caught:
        DumpImage.open(path)
    assert "--sidecar" in (caught.value.hint or "")
    DumpImage.open(path, moved).close()
    document = msgspec.json.decode(moved.read_bytes())
    moved.write_bytes(msgspec.json.encode(document | {"version": 99}))
    with pytest.raises(DumpError, match="sidecar version 99, this mktme reads"):
        DumpImage.open(path, moved)
    moved.write_text("{}")
    with pytest.raises(DumpError, match="no valid sidecar"):
        DumpImage.open(path, moved)


@pytest.mark.parametrize(
    "pages",
    [
        (PageRange(base=0, size_bytes=2 * PAGE, keyid=1),) * 2,
        (PageRange(base=DRAM_BYTES, size_bytes=PAGE, keyid=1),),
        (PageRange(base=1, size_bytes=PAGE, keyid=1),),
    ],
    ids=["overlap", "outside", "unaligned"],
)
def test_sidecar_that_contradicts_itself(
    make_image: MakeImage, pages: tuple[PageRange, ...]
) -> None:
    path = make_image({0: DATA}, msgspec.structs.replace(describe(), pages=pages))
    with pytest.raises(DumpError, match="inconsistent"):
        DumpImage.open(path)


def test_macs_that_are_missing(make_image: MakeImage) -> None:
    record = msgspec.structs.replace(describe(), integrity=IntegrityRecord(file="dram.mac"))
    path = make_image({0: DATA}, record)
    DumpImage.open(path).close()
    mac_path(path).unlink()
    with pytest.raises(DumpError, match=r"dram\.mac: no such file"):
        DumpImage.open(path)


def test_image_that_changes_is_noticed(make_image: MakeImage, tmp_path: Path) -> None:
    path = make_image({0: DATA})
    with DumpImage.open(path) as image:
        with path.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(DumpChangedError, match="changed while it was read") as caught:
            image.check_unchanged()
        assert "mktme dump capture" in (caught.value.hint or "")
    with DumpImage.open(path) as image:
        os.replace(make_image({}, name="other"), path)
        with pytest.raises(DumpChangedError):
            image.check_unchanged()
    with DumpImage.open(path) as image:
        os.truncate(path, PAGE)
        with pytest.raises(DumpChangedError, match="cut short at 0x1000"):
            image.read(0, 2 * PAGE)
        path.unlink()
        with pytest.raises(DumpChangedError, match="No such file"):
            image.check_unchanged()


def test_nvdimm_has_an_image_of_its_own(make_image: MakeImage, tmp_path: Path) -> None:
    module = tmp_path / "nvdimm.img"
    module.write_bytes(DATA)
    at = 2 * PAGE
    record = msgspec.structs.replace(
        describe(),
        modules=(ModuleRecord(base=at, size_bytes=len(DATA), file=f"/none/{module.name}"),),
    )
    path = make_image({0: b"a" * PAGE, 5 * PAGE: b"b" * PAGE}, record)
    with DumpImage.open(path) as image:
        assert image.data_ranges() == [Region(0, PAGE), Region(at, len(DATA) + PAGE)]
        whole = b"a" * PAGE + bytes(PAGE) + DATA + b"b" * PAGE
        assert image.read(0, len(whole)).tobytes() == whole
        assert image.read(at + 10, 20).tobytes() == DATA[10:30]
        module.write_bytes(DATA)
        with pytest.raises(DumpChangedError):
            image.check_unchanged()
    module.write_bytes(DATA[:PAGE])
    with pytest.raises(DumpError, match="4096 bytes, and the NVDIMM at 0x2000 has 12288"):
        DumpImage.open(path)


def test_file_that_nothing_describes(tmp_path: Path) -> None:
    path = tmp_path / "memory.raw"
    path.write_bytes(DATA + b"tail")
    with DumpImage.open_raw(path) as image:
        assert image.sidecar is None
        assert b"".join(one.data.tobytes() for one in image.chunks(PAGE)) == DATA + b"tail"
        assert not image.keyids().any()
        assert image.key(0) is None
        with pytest.raises(DumpError, match="no VM is named 'alice'"):
            image.vm("alice")


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="No such file"):
        DumpImage.open(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(DumpError, match="empty"):
        DumpImage.open_raw(tmp_path / "empty")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(DumpError, match="not a regular file"):
            DumpImage.open_raw(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DumpError, match="not a regular file"):
        DumpImage.open_raw(tmp_path / "fifo")


def test_addresses_that_are_not_in_it(make_image: MakeImage) -> None:
    with DumpImage.open(make_image({})) as image:
        assert image.data_ranges() == []
        assert list(image.pieces(CHUNK_BYTES)) == []
        for address, size in ((-1, 1), (DRAM_BYTES, 1), (0, DRAM_BYTES + 1)):
            with pytest.raises(AddressError):
                image.read(address, size)


def test_closing_twice_does_nothing(make_image: MakeImage) -> None:
    image = DumpImage.open(make_image({}))
    image.close()
    image.close()
