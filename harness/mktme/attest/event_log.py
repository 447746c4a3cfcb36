# SPDX-License-Identifier: GPL-2.0-or-later
"""What firmware, boot loader and kernel say that they measured: the TCG event log, and its replay.

The kernel shows it as ``/sys/kernel/security/tpm0/binary_bios_measurements``. Nothing protects the
log: it counts for what a quote of the PCRs confirms. That covers digests, PCRs and order; what an
event says of itself is true only where it is what was hashed (`Event.text`).

Source: TCG PC Client Platform Firmware Profile 1.05 rev. 23, section 10 (crypto agile format 10.2,
events 10.4). GRUB, grub-core/commands/tpm.c. Linux, drivers/firmware/efi/libstub.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mktme.attest.marshal import SHA256, Reader

LOG_MAX_BYTES: Final = 1 << 20
PCRS: Final = 24
_DIGEST_BYTES: Final = {0x0004: 20, SHA256: 32, 0x000C: 48, 0x000D: 64}
"""Banks that a TPM may have beside that of SHA-256: SHA-1, SHA-384, SHA-512."""
_EVENT_MAX_BYTES: Final = 64 << 10
_BANKS_MAX: Final = 8
_SIGNATURE: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_LOCALITIES: Final = range(5)
# Those of a dynamic launch start as ones (TPM PC Client Platform Profile, 4.6.2).
_DYNAMIC: Final = range(17, 23)
# What GRUB puts before a string that it measures without.
_GRUB_PREFIXES: Final = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ", b"")


class EventKind(enum.Enum):
    """Kinds of events that have a meaning here; the value is the specification's number."""

    NO_ACTION = 0x3
    SEPARATOR = 0x4
    ACTION = 0x5
    S_CRTM_VERSION = 0x8
    IPL = 0xD
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_ACTION = 0x80000007
    EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement.

    Attributes:
        pcr: what it was extended into.
        type: the specification's number.
        sha256: what it was extended with.
        data: what it says of itself.
    """

    pcr: int
    type: int
    sha256: bytes
    data: bytes

    @property
    def kind(self) -> EventKind | None:
        """Its kind, None for one that has no meaning here."""
        try:
            return EventKind(self.type)
        except ValueError:
            return None

    @property
    def text(self) -> str | None:
        """The string that was measured: GRUB's commands and its kernel's command line.

        None where what the event says is not what was hashed, as of a file, whose name is only
        what somebody called it.
        """
        said = self.data.rstrip(b"\0")
        for prefix in _GRUB_PREFIXES:
            measured = said.removeprefix(prefix)
            if said.startswith(prefix) and hashlib.sha256(measured).digest() == self.sha256:
                return _printable(measured)
        return None

    @property
    def label(self) -> str:
        """What it says of itself, for people; not to be trusted."""
        return _printable(self.data.rstrip(b"\0"))


@dataclass(frozen=True, slots=True)
class EventLog:
    """A log that is well-formed.

    Attributes:
        events: what was measured, in this order.
        locality: from which the TPM was started, 0 to 4.
    """

    events: tuple[Event, ...]
    locality: int = 0

    @classmethod
    def parse(cls, data: bytes) -> EventLog:
        """Read a crypto agile log, of which the bank of SHA-256 is kept.

        Raises:
            TpmFormatError: it is none, or has no such bank.
        """
        reader = Reader(data, "little", "the event log")
        if len(data) > LOG_MAX_BYTES:
            raise reader.wrong(f"has {len(data)} bytes, more than {LOG_MAX_BYTES}")
        banks = _banks(reader)
        events: list[Event] = []
        locality = 0
        while reader.left:
            event = _event(reader, banks)
            if event.kind is not EventKind.NO_ACTION:
                events.append(event)
            elif event.data.startswith(_STARTUP_LOCALITY):
                if events or event.pcr or len(event.data) != len(_STARTUP_LOCALITY) + 1:
                    raise reader.wrong("has a start-up locality that is none")
                locality = event.data[-1]
                if locality not in _LOCALITIES:
                    raise reader.wrong(f"has a start from locality {locality}")
        return cls(tuple(events), locality)

    def replay(self) -> tuple[bytes, ...]:
        """What the PCRs of the bank of SHA-256 have to be: 24 times 32 bytes."""
        values = [(b"\xff" if pcr in _DYNAMIC else b"\0") * 32 for pcr in range(PCRS)]
        values[0] = self.locality.to_bytes(32, "big")
        for event in self.events:
            values[event.pcr] = hashlib.sha256(values[event.pcr] + event.sha256).digest()
        return tuple(values)

    def of(self, pcr: int, kind: EventKind | None = None) -> Iterator[Event]:
        """The events of a PCR, or those of them that are of a kind."""
        for event in self.events:
            if event.pcr == pcr and kind in (None, event.kind):
                yield event


def _banks(reader: Reader) -> dict[int, int]:
    """The first event, of the old format, says which banks there are: digest sizes by algorithm."""
    pcr, kind, digest = reader.number(4), reader.number(4), reader.take(20)
    if pcr or kind != EventKind.NO_ACTION.value or any(digest):
        raise reader.wrong("does not start with a Spec ID event")
    size_bytes = reader.number(4)
    end = reader.offset + size_bytes
    if reader.take(len(_SIGNATURE)) != _SIGNATURE:
        raise reader.wrong("is not in the crypto agile format of TPM 2.0")
    reader.take(8)  # platform class, version, errata, size of a UINTN
    count = reader.number(4)
    if not 0 < count <= _BANKS_MAX:
        raise reader.wrong(f"has {count} banks")
    banks: dict[int, int] = {}
    for _ in range(count):
        algorithm, digest_bytes = reader.number(2), reader.number(2)
        if algorithm in banks or _DIGEST_BYTES.get(algorithm, digest_bytes) != digest_bytes:
            raise reader.wrong(f"has a bank {algorithm:#06x} twice, or of {digest_bytes} bytes")
        if not 0 < digest_bytes <= 64:
            raise reader.wrong(f"has digests of {digest_bytes} bytes")
        banks[algorithm] = digest_bytes
    reader.take(reader.number(1))  # the vendor's
    if reader.offset != end:
        raise reader.wrong(f"has a Spec ID event that is not the {size_bytes} bytes it says")
    if SHA256 not in banks:
        raise reader.wrong("has no bank of SHA-256")
    return banks


def _event(reader: Reader, banks: dict[int, int]) -> Event:
    """A TCG_PCR_EVENT2."""
    pcr, kind, count = (reader.number(4) for _ in range(3))
    # An event that extends nothing may say -1.
    if pcr >= PCRS and kind != EventKind.NO_ACTION.value:
        raise reader.wrong(f"has an event of PCR {pcr}")
    if count != len(banks):
        raise reader.wrong(f"has an event with {count} digests, and {len(banks)} banks")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.number(2)
        if algorithm not in banks or algorithm in digests:
            raise reader.wrong(f"has an event with a digest of {algorithm:#06x}")
        digests[algorithm] = reader.take(banks[algorithm])
    size_bytes = reader.number(4)
    if size_bytes > _EVENT_MAX_BYTES:
        raise reader.wrong(f"has an event of {size_bytes} bytes")
    return Event(pcr, kind, digests[SHA256], reader.take(size_bytes))


def _printable(data: bytes) -> str:
    """Text that a terminal can be given."""
    text = data.decode(errors="replace")
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
