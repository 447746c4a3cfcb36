# SPDX-License-Identifier: GPL-2.0-or-later
"""NVDIMMs: ranges of DRAM in images of their own, and what of these is accepted."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import AddressError, DramError, DramFullError
from mktme.engine.nvdimm import Nvdimm
from mktme.engine.sidecar import sidecar_path
from mktme.engine.xts import PAGE_BYTES, Algorithm

MIB = 1 << 20
XTS = Algorithm.AES_XTS_128


@pytest.fixture
def dram(tmp_path: Path) -> Iterator[Dram]:
    with Dram.create(tmp_path / "dram", 8 * MIB) as dram:
        yield dram


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pmem"


def made(path: Path, algorithm: Algorithm | None = XTS) -> None:
    Nvdimm.create(path, 2 * MIB, 4 * MIB, algorithm).close()


def test_range_of_dram_is_in_the_module(dram: Dram, path: Path) -> None:
    nvdimm = Nvdimm.create(path, 2 * MIB, 3 * MIB, XTS)
    before = os.urandom(8 * MIB)
    dram.write(0, before)
    dram.attach(nvdimm.base, nvdimm.cells)
    data = os.urandom(4 * MIB)  # over both edges
    dram.write(2 * MIB, data)
    found = bytearray(8 * MIB)
    dram.read_into(0, found)
    assert found == before[: 2 * MIB] + data + before[6 * MIB :]
    assert path.read_bytes() == data[MIB : 3 * MIB]
    in_dram = dram.path.read_bytes()
    assert in_dram[3 * MIB : 5 * MIB] == before[3 * MIB : 5 * MIB]

    dram.erase(Region(4 * MIB, 2 * MIB))
    dram.read_into(0, found)
    assert not any(found[4 * MIB : 6 * MIB])
    assert path.read_bytes() == data[MIB : 2 * MIB] + bytes(MIB)

    dram.detach(nvdimm.cells)
    nvdimm.close()
    dram.read_into(0, found)
    assert found[3 * MIB : 5 * MIB] == before[3 * MIB : 5 * MIB]


def test_macs_of_the_range_are_beside_the_module(dram: Dram, path: Path) -> None:
    nvdimm = Nvdimm.create(path, 2 * MIB, 3 * MIB, Algorithm.AES_XTS_128_INTEGRITY)
    dram.attach(nvdimm.base, nvdimm.cells)
    entries = np.arange(1, 4 * PAGE_BYTES // 64 + 1, dtype=np.uint32)
    dram.write_macs(3 * MIB - 2 * PAGE_BYTES, entries.data)
    assert dram.has_macs
    found = np.zeros_like(entries)
    dram.read_macs_into(3 * MIB - 2 * PAGE_BYTES, found.data)
    assert (found == entries).all()
    own = np.fromfile(mac_path(path), np.uint32)
    assert (own[:128] == entries[128:]).all()
    assert not own[128:].any()
    dram.detach(nvdimm.cells)
    nvdimm.close()
    with Dram.open(path) as again:  # what opens it later knows
        assert again.has_macs


def test_full_module_is_told_by_drams_address(
    dram: Dram, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvdimm = Nvdimm.create(path, 2 * MIB, 3 * MIB, XTS)
    dram.attach(nvdimm.base, nvdimm.cells)

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DramFullError) as caught:
        dram.write(3 * MIB + 4096, bytes(4096))
    assert caught.value.address == 3 * MIB + 4096
    with pytest.raises(DramFullError) as caught:
        dram.write_macs(3 * MIB + 4096, bytes(256))
    assert caught.value.address == 3 * MIB + 4096
    nvdimm.close()


def test_modules_do_not_share_addresses(dram: Dram, path: Path) -> None:
    first = Nvdimm.create(path, 2 * MIB, 2 * MIB, XTS)
    second = Nvdimm.create(path.with_name("other"), 2 * MIB, 3 * MIB, XTS)
    dram.attach(2 * MIB, first.cells)
    with pytest.raises(AddressError, match="has a module already"):
        dram.attach(3 * MIB, second.cells)
    with pytest.raises(AddressError, match="not in DRAM"):
        dram.attach(7 * MIB, second.cells)
    first.close()
    second.close()


def test_region_can_be_had_at_its_place_only_when_it_is_free(dram: Dram) -> None:
    assert dram.allocate(2 * MIB, base=3 * MIB) == Region(3 * MIB, 2 * MIB)
    assert dram.allocate(MIB) == Region(0, MIB)
    assert dram.allocate(MIB) == Region(2 * MIB, MIB)
    with pytest.raises(AddressError, match=r"0x400000 to 0x5fffff of DRAM is not free"):
        dram.allocate(2 * MIB, base=4 * MIB)
    with pytest.raises(AddressError, match="not in DRAM"):
        dram.allocate(2 * MIB, base=7 * MIB)
    with pytest.raises(ValueError, match="4 KiB page"):
        dram.allocate(2 * MIB, base=100)
    assert dram.allocate(2 * MIB, base=5 * MIB) == Region(5 * MIB, 2 * MIB)


# --- the image --------------------------------------------------------------------------------


def test_image_is_what_it_was(path: Path) -> None:
    made(path)
    assert {one.stat().st_mode & 0o777 for one in path.parent.glob("pmem*")} == {0o600}
    nvdimm = Nvdimm.open(path, 2 * MIB)
    assert (nvdimm.base, nvdimm.size_bytes, nvdimm.path) == (4 * MIB, 2 * MIB, path)
    nvdimm.check_algorithm(XTS)
    with pytest.raises(DramError, match="holds aes-xts-128, and the KeyID is for plaintext"):
        nvdimm.check_algorithm(None)
    with pytest.raises(DramError, match="writes this image"):
        Nvdimm.open(path, 2 * MIB)
    nvdimm.close()


def test_description_is_for_others(path: Path) -> None:
    made(path, Algorithm.AES_XTS_128_INTEGRITY)
    plain = json.loads(sidecar_path(path).read_text())
    assert plain["schema"] == "mktme-nvdimm"
    assert (plain["base"], plain["size_bytes"]) == (4 * MIB, 2 * MIB)
    assert plain["algorithm"] == "aes-xts-128-integrity"
    assert plain["integrity"]["file"] == "pmem.mac"
    assert "'base' plus its byte offset" in plain["tweak"]


def test_image_that_was_not_left_cleanly_is_refused(path: Path) -> None:
    made(path)
    nvdimm = Nvdimm.open(path, 2 * MIB)
    nvdimm.set_clean(False)
    nvdimm.close()
    with pytest.raises(DramError, match="did not end cleanly") as caught:
        Nvdimm.open(path, 2 * MIB)
    assert '"clean"' in str(caught.value.hint)
    text = sidecar_path(path).read_text()
    sidecar_path(path).write_text(text.replace('"clean": false', '"clean": true'))
    Nvdimm.open(path, 2 * MIB).close()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def resize(path: Path, size_bytes: int) -> None:
    os.truncate(path, size_bytes)
    os.truncate(mac_path(path), size_bytes // 16)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda path: sidecar_path(path).unlink(), "cannot read the sidecar"),
    "no image": (lambda path: path.unlink(), "No such file"),
    "no macs": (lambda path: mac_path(path).unlink(), "No such file"),
    "cut short": (lambda path: os.truncate(path, MIB), "are not the MACs of"),
    "of another size": (
        lambda path: resize(path, 4 * MIB),
        "of 2097152 bytes in an image of 4194304",
    ),
    "a DRAM's description": (
        lambda path: sidecar_path(path).write_text('{"schema": "mktme-dram", "version": 4}'),
        "its schema is 'mktme-dram'",
    ),
    "of the future": (
        lambda path: sidecar_path(path).write_text('{"schema": "mktme-nvdimm", "version": 2}'),
        "version 2, this mktme reads 1",
    ),
    "off its page": (
        lambda path: sidecar_path(path).write_text(
            sidecar_path(path).read_text().replace(f'"base": {4 * MIB}', '"base": 100')
        ),
        "no page is at 0x64",
    ),
    "a pipe": (lambda path: make_pipe(sidecar_path(path)), "no valid sidecar"),
}


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED.keys())
def test_foreign_images_are_refused(
    path: Path, spoil: Callable[[Path], object], match: str
) -> None:
    made(path)
    spoil(path)
    with pytest.raises(DramError, match=match):
        Nvdimm.open(path, 2 * MIB)


def test_what_is_there_is_not_replaced(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(DramError, match="exists"):
        made(path)
    assert path.read_bytes() == b"precious"


def test_nothing_is_left_of_what_cannot_be_described(path: Path) -> None:
    sidecar_path(path).mkdir()
    with pytest.raises(DramError, match="cannot write the sidecar"):
        made(path)
    assert [one.name for one in path.parent.iterdir()] == ["pmem.json"]
