# SPDX-License-Identifier: GPL-2.0-or-later
"""What an image is of: its platform, VMs and KeyIDs, and how it was captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import numpy as np

from mktme.dump.image import DumpError, DumpImage
from mktme.engine.dram import Region, mac_path
from mktme.engine.keys import KeyMode
from mktme.engine.sidecar import CaptureRecord, GuestSegment
from mktme.engine.snapshot import ContentsDigest
from mktme.engine.text import spelled
from mktme.engine.xts import PAGE_BYTES, Algorithm


@dataclass(frozen=True, slots=True)
class KeyIdInfo:
    """One KeyID.

    Attributes:
        algorithm: None for plaintext.
        size_bytes: how much of DRAM is under it.
        written_bytes: how much of that the image holds anything for.
    """

    keyid: int
    mode: KeyMode
    algorithm: Algorithm | None
    size_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class VmInfo:
    """One VM.

    Attributes:
        base: where its memory begins in DRAM.
        size_bytes: all of it.
        written_bytes: how much of that the image holds anything for.
        segments: where its guest has it; none if its QEMU was not there.
    """

    name: str
    uuid: UUID
    keyid: int
    base: int
    size_bytes: int
    written_bytes: int
    segments: tuple[GuestSegment, ...]


@dataclass(frozen=True, slots=True)
class InfoReport:
    """The document of `mktme dump info`.

    Attributes:
        size_bytes: bytes of DRAM.
        written_bytes: what is no hole.
        physical_address_bits: KeyID bits included.
        keyids: those programmed, and KeyID 0, which the others are as.
        nvdimms: paths of what has an image of its own.
        integrity: whether there are MACs.
        capture: how it was copied; None, it is a platform's own.
        verified: whether the files have the digests of the capture; None, nobody looked.
    """

    schema: Literal["mktme.dump-info"]
    version: Literal[1]
    image: str
    size_bytes: int
    written_bytes: int
    physical_address_bits: int
    keyid_bits: int
    keyids: tuple[KeyIdInfo, ...]
    vms: tuple[VmInfo, ...]
    nvdimms: tuple[str, ...]
    integrity: bool
    capture: CaptureRecord | None
    verified: bool | None


def describe_image(image: DumpImage, *, verify: bool = False) -> InfoReport:
    """What an image is of.

    Args:
        image: one with a sidecar.
        verify: read all of it, and compare its digest with the capture's.

    Raises:
        DumpError: it has no sidecar, or none of a capture to verify it with; it is not as it was
            captured, cannot be read, or changed meanwhile.
    """
    sidecar = image.sidecar
    if sidecar is None:
        raise DumpError(f"{image.path}: nothing describes it")
    if verify:
        _verify(image, sidecar.capture)
    ranges = image.data_ranges()
    keyids = image.keyids()
    known = {one.keyid for one in sidecar.keys}
    keyids[~np.isin(keyids, list(known))] = 0
    written = np.zeros(len(keyids), np.bool_)
    for region in ranges:
        written[region.base // PAGE_BYTES : region.end // PAGE_BYTES] = True
    of_all = np.bincount(keyids, minlength=max(known) + 1)
    of_written = np.bincount(keyids[written], minlength=max(known) + 1)
    report = InfoReport(
        schema="mktme.dump-info",
        version=1,
        image=spelled(image.path),
        size_bytes=image.size_bytes,
        written_bytes=sum(region.size_bytes for region in ranges),
        physical_address_bits=sidecar.platform.maxphyaddr,
        keyid_bits=sidecar.platform.keyid_bits,
        keyids=tuple(
            KeyIdInfo(
                keyid=one.keyid,
                mode=one.mode,
                algorithm=one.algorithm,
                size_bytes=int(of_all[one.keyid]) * PAGE_BYTES,
                written_bytes=int(of_written[one.keyid]) * PAGE_BYTES,
            )
            for one in sidecar.keys
        ),
        vms=tuple(
            VmInfo(
                name=one.name,
                uuid=one.uuid,
                keyid=one.keyid,
                base=one.base,
                size_bytes=one.size_bytes,
                written_bytes=_written(ranges, Region(one.base, one.size_bytes)),
                segments=one.segments,
            )
            for one in sidecar.vms
        ),
        nvdimms=tuple(spelled(path) for _, path in image.module_files()),
        integrity=sidecar.integrity is not None,
        capture=sidecar.capture,
        verified=True if verify else None,
    )
    image.check_unchanged()
    return report


def _written(ranges: list[Region], region: Region) -> int:
    return sum(max(0, min(one.end, region.end) - max(one.base, region.base)) for one in ranges)


def _verify(image: DumpImage, capture: CaptureRecord | None) -> None:
    if capture is None:
        raise DumpError(
            f"{image.path}: it was not captured, so there is no digest to verify it with",
            hint="mktme dump capture makes images that have one",
        )
    check_digest(image, capture.sha256)
    if capture.mac_sha256 is not None:
        with DumpImage.open_raw(mac_path(image.path)) as macs:
            check_digest(macs, capture.mac_sha256)


def check_digest(image: DumpImage, expected: str) -> None:
    """Compare a file with its digest.

    Raises:
        DumpError: it is another, or the file cannot be read, or changed meanwhile.
    """
    digest = ContentsDigest()
    for chunk in image.chunks():
        digest.update(chunk.address, chunk.data)
    image.check_unchanged()
    if digest.hexdigest() != expected:
        raise DumpError(
            f"{image.path}: not as it was captured: its digest is {digest.hexdigest()[:16]}…,"
            f" its sidecar says {expected[:16]}…",
            hint="capture or copy it again",
        )
