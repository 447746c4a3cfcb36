# SPDX-License-Identifier: GPL-2.0-or-later
"""The sidecar: JSON beside a DRAM image that says how to read it. Never a key.

Whoever knows a key can decrypt the image with any AES-XTS library from this description alone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar
from uuid import UUID

import msgspec

from mktme.engine.errors import DramError
from mktme.engine.integrity import ENTRY_BYTES, MAC_RULE
from mktme.engine.keys import MAX_KEYID_BITS, KeyDescription
from mktme.engine.xts import LINE_BYTES

SIDECAR_SCHEMA: Final = "mktme-dram"
SIDECAR_VERSION: Final = 5
_SIDECAR_MAX_BYTES: Final = 64 << 20
_T = TypeVar("_T", bound=msgspec.Struct)

TWEAK_RULE: Final = (
    "AES-XTS (IEEE 1619, NIST SP 800-38E), the key being the data key followed by the tweak key. "
    "Each 64 bytes of the image are a data unit; its tweak is its byte offset in the image as "
    "a 16-byte little-endian number. The KeyID is not part of the tweak."
)
CONTENTS_RULE: Final = (
    "SHA-256 of the 4096-byte pages of the file that are not all zero, in order, each after its "
    "byte offset as an 8-byte little-endian number."
)
NEVER_WRITTEN_RULE: Final = (
    "64 bytes that are all zero were never written and read as 64 zero bytes whatever the KeyID."
)

_Bytes = Annotated[int, msgspec.Meta(ge=0)]
_KeyId = Annotated[int, msgspec.Meta(ge=0, lt=1 << MAX_KEYID_BITS)]


class PlatformRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the platform.

    Attributes:
        maxphyaddr: bits of a physical address, KeyID bits included (CPUID 80000008H:EAX[7:0]).
        keyid_bits: how many of them, the uppermost, are KeyID.
        dram_bytes: bytes of DRAM.
    """

    maxphyaddr: Annotated[int, msgspec.Meta(ge=32, le=52)]
    keyid_bits: Annotated[int, msgspec.Meta(ge=0, le=MAX_KEYID_BITS)]
    dram_bytes: _Bytes


class GuestSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run of guest-physical addresses, and the run of its VM's RAM offsets behind it."""

    guest_physical: _Bytes
    ram_offset: _Bytes
    size_bytes: _Bytes


class VmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a VM's RAM is: RAM offset 0 at ``base`` in DRAM."""

    uuid: UUID
    name: str
    base: _Bytes
    size_bytes: _Bytes
    keyid: _KeyId
    segments: tuple[GuestSegment, ...]


class PageRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run of pages assigned to one KeyID."""

    base: _Bytes
    size_bytes: _Bytes
    keyid: _KeyId


class ExclusionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """KeyID 0 holds plaintext where ``address & mask == base & mask`` (MSRs 983H and 984H)."""

    mask: _Bytes
    base: _Bytes


class ModuleRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A range of DRAM that is in an image of its own, an NVDIMM's, with a description beside it.

    Attributes:
        file: path of that image.
    """

    base: _Bytes
    size_bytes: _Bytes
    file: str


class IntegrityRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The MACs of lines.

    Attributes:
        file: the MAC area's name; it is in the image's directory.
        entry_bytes: what a line has in it.
        rule: how an entry is made and checked, for a reader who has only this file.
    """

    file: str
    entry_bytes: Literal[4] = ENTRY_BYTES
    rule: str = MAC_RULE


class CaptureRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an image was copied off a platform that ran.

    Attributes:
        captured_at: the moment that it is of, UTC, RFC 3339.
        method: `mktme.engine.snapshot.CopyMethod`.
        vms: whose memory it has; None: all of DRAM.
        pause_s: how long guests were held for it, from the first that was stopped to the last that
            went on, seconds; None: none that ran had to be.
        total_s: how long it took in all, seconds.
        data_bytes: pages that hold anything.
        saved_bytes: how much of that was about to be written, and so was copied first.
        sha256, mac_sha256: digests of the image and of its MACs, None if it has none.
        digest: rule, for a reader who has only this file.
    """

    captured_at: str
    method: Literal["reflink", "copy-on-write"]
    vms: tuple[UUID, ...] | None
    pause_s: float | None
    total_s: float
    data_bytes: _Bytes
    saved_bytes: _Bytes
    sha256: str
    mac_sha256: str | None
    digest: str = CONTENTS_RULE


class Sidecar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that it takes, besides the keys, to read a DRAM image. Never a key.

    Attributes:
        platform: sizes.
        keys: how KeyIDs are programmed; one that is not listed is as KeyID 0. Without an
            algorithm, its memory is plaintext.
        exclusion: where KeyID 0's is, although it has an algorithm; None: nowhere.
        vms: whose RAM is where.
        pages: the KeyID of every page of DRAM.
        integrity: the MACs of lines; None, no KeyID has integrity.
        modules: ranges that this image does not hold.
        capture: how it was copied; None, it is the platform's own.
        tweak, never_written: rules, for a reader who has only this file.
    """

    schema: Literal["mktme-dram"] = SIDECAR_SCHEMA
    version: Literal[5] = SIDECAR_VERSION
    platform: PlatformRecord
    data_unit_bytes: Literal[64] = LINE_BYTES
    tweak: str = TWEAK_RULE
    never_written: str = NEVER_WRITTEN_RULE
    keys: tuple[KeyDescription, ...]
    exclusion: ExclusionRecord | None = None
    vms: tuple[VmRecord, ...]
    pages: tuple[PageRange, ...]
    integrity: IntegrityRecord | None = None
    modules: tuple[ModuleRecord, ...] = ()
    capture: CaptureRecord | None = None


class _Header(msgspec.Struct):
    schema: str
    version: int


def sidecar_path(image: Path) -> Path:
    """Where the sidecar of an image is: ``<image>.json``."""
    return image.with_name(f"{image.name}.json")


def write_sidecar(path: Path, sidecar: msgspec.Struct) -> None:
    """Write a sidecar, replacing an older one in one step; only its owner can access it.

    Args:
        path: see `sidecar_path`.
        sidecar: what to write, a `Sidecar` or an NVDIMM's.

    Raises:
        DramError: it cannot be written; an older one is still there.
    """
    data = encode_sidecar(sidecar)
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise DramError(f"{path}: cannot write the sidecar: {error.strerror}") from error


def encode_sidecar(sidecar: msgspec.Struct) -> bytes:
    """A sidecar as its file has it."""
    return msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n"


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar.

    Args:
        path: see `sidecar_path`.

    Raises:
        DramError: it cannot be read, is no sidecar, or is of another version.
    """
    return read_description(path, Sidecar, SIDECAR_SCHEMA, SIDECAR_VERSION)


def _open_now(path: str, flags: int) -> int:
    """Open a file, without waiting for the other end of what is a FIFO."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def read_description(path: Path, kind: type[_T], schema: str, version: int) -> _T:
    """Read a sidecar of one kind, as `read_sidecar` does."""
    try:
        with open(path, "rb", opener=_open_now) as file:
            data = file.read(_SIDECAR_MAX_BYTES + 1)
    except OSError as error:
        raise DramError(f"{path}: cannot read the sidecar: {error.strerror}") from error
    if len(data) > _SIDECAR_MAX_BYTES:
        raise DramError(f"{path}: no sidecar: larger than {_SIDECAR_MAX_BYTES} bytes")
    try:
        header = msgspec.json.decode(data, type=_Header)
        if header.schema != schema:
            raise DramError(f"{path}: no sidecar: its schema is {header.schema!r}")
        if header.version != version:
            raise DramError(
                f"{path}: sidecar version {header.version}, this mktme reads {version}",
                hint="use the mktme that wrote it",
            )
        return msgspec.json.decode(data, type=kind)
    # msgspec's own, and what it lets through: of text that is not UTF-8, and of deep nesting.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DramError(f"{path}: no valid sidecar: {error}") from error
