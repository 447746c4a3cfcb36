# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of an image, and whether it is as it was captured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from mktme.dump.image import DumpError, DumpImage
from mktme.dump.info import describe_image
from mktme.engine.dram import mac_path
from mktme.engine.sidecar import (
    CaptureRecord,
    IntegrityRecord,
    PageRange,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.snapshot import ContentsDigest
from mktme.engine.xts import Algorithm

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_BYTES, VM_KEYID, MakeImage, describe

DATA = b"x" * 3 * PAGE


def digest(path: Path) -> str:
    made = ContentsDigest()
    made.update(0, np.fromfile(path, np.uint8))
    return made.hexdigest()


def captured(path: Path) -> CaptureRecord:
    """Describe an image as one that was captured."""
    record = CaptureRecord(
        captured_at="2026-01-01T00:00:00.000+00:00",
        method="copy-on-write",
        vms=None,
        pause_s=0.03,
        total_s=0.5,
        data_bytes=len(DATA),
        saved_bytes=0,
        sha256=digest(path),
        mac_sha256=digest(mac_path(path)),
    )
    sidecar = msgspec.structs.replace(
        describe(), capture=record, integrity=IntegrityRecord(file=mac_path(path).name)
    )
    write_sidecar(sidecar_path(path), sidecar)
    return record


def test_what_is_said_of_an_image(make_image: MakeImage) -> None:
    pages = (
        *describe().pages[1:2],
        PageRange(base=0, size_bytes=PAGE, keyid=9),  # not programmed: as KeyID 0
    )
    path = make_image(
        {0: DATA[:PAGE], VM_BASE + PAGE: DATA}, msgspec.structs.replace(describe(), pages=pages)
    )
    with DumpImage.open(path) as image:
        report = describe_image(image)
    assert (report.size_bytes, report.written_bytes) == (DRAM_BYTES, 4 * PAGE)
    assert (report.physical_address_bits, report.keyid_bits) == (46, 6)
    assert [(one.keyid, one.size_bytes, one.written_bytes) for one in report.keyids] == [
        (0, DRAM_BYTES - VM_BYTES, PAGE),
        (VM_KEYID, VM_BYTES, 3 * PAGE),
    ]
    assert report.keyids[1].algorithm is Algorithm.AES_XTS_256
    (vm,) = report.vms
    assert (vm.name, vm.base, vm.size_bytes, vm.written_bytes) == (
        "alice",
        VM_BASE,
        VM_BYTES,
        3 * PAGE,
    )
    assert (report.capture, report.verified, report.integrity) == (None, None, False)


def test_image_that_is_as_it_was_captured(make_image: MakeImage) -> None:
    path = make_image({VM_BASE: DATA})
    record = captured(path)
    with DumpImage.open(path) as image:
        report = describe_image(image, verify=True)
    assert (report.capture, report.verified, report.integrity) == (record, True, True)


@pytest.mark.parametrize("which", ["image", "macs"])
def test_image_that_is_not(make_image: MakeImage, which: str) -> None:
    path = make_image({VM_BASE: DATA})
    captured(path)
    changed = path if which == "image" else mac_path(path)
    with changed.open("r+b") as file:
        file.write(b"y")
    with (
        DumpImage.open(path) as image,
        pytest.raises(DumpError, match=f"{changed.name}: not as it was captured"),
    ):
        describe_image(image, verify=True)


def test_nothing_to_verify_it_with(make_image: MakeImage, tmp_path: Path) -> None:
    path = make_image({VM_BASE: DATA})
    with DumpImage.open(path) as image, pytest.raises(DumpError, match="was not captured"):
        describe_image(image, verify=True)
    with DumpImage.open_raw(path) as image, pytest.raises(DumpError, match="nothing describes it"):
        describe_image(image)
